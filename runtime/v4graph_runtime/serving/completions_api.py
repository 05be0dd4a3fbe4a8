"""POST /v1/completions: text to the text behind it, without a chat's format."""

from __future__ import annotations

from typing import Any

from v4graph_runtime.request import Piece, TokenLogprob
from v4graph_runtime.serving.answer import Choice
from v4graph_runtime.serving.errors import ApiError
from v4graph_runtime.serving.http import parse
from v4graph_runtime.serving.job import Job, constraint, new_job, request_options
from v4graph_runtime.serving.schema import CompletionRequest
from v4graph_runtime.serving.service import Service
from v4graph_runtime.serving.tokens import TokenTexts, finite

Event = dict[str, Any]
KINDS = ("text_completion", "text_completion")


class TextChoice:
    """Collects one output."""

    def __init__(self, index: int, tokens: TokenTexts) -> None:
        self._index, self._tokens = index, tokens
        self._text: list[str] = []
        self._length = 0
        self._logprobs: list[tuple[TokenLogprob, int]] = []
        self._sent = 0
        self._finish = "stop"
        self.reasoning_tokens = 0

    def begin(self) -> list[Event]:
        return []

    def push(self, piece: Piece) -> list[Event]:
        if piece.logprob is not None:
            self._logprobs.append((piece.logprob, self._length))
        self._text.append(piece.text)
        self._length += len(piece.text)
        return [self._event(piece.text)] if piece.text else []

    def end(self, cut: bool) -> list[Event]:
        self._finish = "length" if cut else "stop"
        return [self._event("", self._finish)]

    def whole(self) -> Event:
        self._sent = 0
        return self._event("".join(self._text), self._finish)

    def _event(self, text: str, finish: str | None = None) -> Event:
        new, self._sent = self._logprobs[self._sent :], len(self._logprobs)
        return {"index": self._index, "text": text, "logprobs": self._named(new), "finish_reason": finish}

    def _named(self, chosen: list[tuple[TokenLogprob, int]]) -> Event | None:
        if not chosen:
            return None
        name = self._tokens.name_of
        return {
            "tokens": [name(one.token) for one, _ in chosen],
            "token_logprobs": [finite(one.logprob) for one, _ in chosen],
            "top_logprobs": [{name(token): finite(value) for token, value in one.top} for one, _ in chosen],
            "text_offset": [offset for _, offset in chosen],
        }


def prepare(service: Service, data: bytes) -> tuple[Job, list[Choice]]:
    """Return the job of a body, and the choices that collect its outputs.

    Raises:
        ApiError, V4GraphError: it cannot be done.
    """
    body = parse(data, CompletionRequest)
    service.check_model(body.model)
    _check(body)
    wanted = constraint(body, body.response_format)
    prompts = []
    for prompt in body.prompt:
        ids = service.encode(prompt) if isinstance(prompt, str) else prompt
        service.check_ids(ids, "prompt")
        more = {"constraint": wanted, "logprobs": body.logprobs}
        prompts.append((ids, request_options(body, service.engine.session, service.options, ids, **more)))
    job = new_job("cmpl", KINDS, body, prompts)
    return job, [TextChoice(i, service.tokens) for i in range(job.n * len(prompts))]


def _check(body: CompletionRequest) -> None:
    nothing = {"echo": (None, False), "suffix": (None, ""), "best_of": (None, body.n or 1)}
    for name, values in nothing.items():
        if getattr(body, name) not in values:
            raise ApiError(400, f"'{name}' is not supported; leave it out.", param=name, code="unsupported")
