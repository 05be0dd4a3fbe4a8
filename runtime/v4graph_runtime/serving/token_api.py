"""POST /tokenize and /detokenize."""

from __future__ import annotations

from typing import Any

from v4graph_runtime import chat
from v4graph_runtime.serving.chat_api import mode_of
from v4graph_runtime.serving.http import parse
from v4graph_runtime.serving.schema import DetokenizeRequest, TokenizeRequest
from v4graph_runtime.serving.service import Service


def tokenize(service: Service, data: bytes) -> dict[str, Any]:
    """Return the token ids of a text, or of a conversation's prompt.

    Raises:
        ApiError, ChatError: it cannot be done.
    """
    body = parse(data, TokenizeRequest)
    service.check_model(body.model)
    text = body.prompt
    if text is None:
        text = chat.encode(body.messages, mode_of(body, service.options.mode), tools=body.tools or None)
    ids = service.engine.tokenizer.encode(text, start=body.add_special_tokens)
    return {"tokens": ids, "count": len(ids), "max_model_len": service.engine.session.capacity}


def detokenize(service: Service, data: bytes) -> dict[str, Any]:
    """Return the text of token ids, control tokens included.

    Raises:
        ApiError: it cannot be done.
    """
    body = parse(data, DetokenizeRequest)
    service.check_model(body.model)
    service.check_ids(body.tokens, "tokens")
    core = service.engine.tokenizer.core
    return {"prompt": core.decode(body.tokens, skip_special_tokens=False)}
