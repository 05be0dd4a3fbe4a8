"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from v4graph_runtime import chat
from v4graph_runtime.chat import Message, Mode
from v4graph_runtime.chat.format import END_THINK
from v4graph_runtime.serving.answer import Choice
from v4graph_runtime.serving.chat_answer import ChatChoice
from v4graph_runtime.serving.errors import ApiError
from v4graph_runtime.serving.http import parse
from v4graph_runtime.serving.job import Job, constraint, new_job, request_options
from v4graph_runtime.serving.schema import ChatRequest, Conversation, ResponseFormat
from v4graph_runtime.serving.service import Service

KINDS = ("chat.completion", "chat.completion.chunk")
EFFORTS: dict[str, Mode] = {
    "none": "chat",
    **dict.fromkeys(("minimal", "low", "medium", "high"), "thinking"),
    **dict.fromkeys(("xhigh", "max"), "max"),
}
NOT_SUPPORTED = {
    "functions": "give 'tools' instead",
    "function_call": "give 'tools' and 'tool_choice' instead",
    "audio": "the model writes text only",
    "prediction": "leave it out",
    "web_search_options": "leave it out, or give a tool that searches",
    "moderation": "leave it out",
}
ASKS = ("user", "tool", "developer")


def prepare(service: Service, data: bytes) -> tuple[Job, list[Choice]]:
    """Return the job of a body, and the choices that read its outputs.

    Raises:
        ApiError, V4GraphError: it cannot be done.
    """
    body = parse(data, ChatRequest)
    service.check_model(body.model)
    _check(body)
    mode = mode_of(body, service.options.mode)
    wanted = constraint(body, body.response_format, "" if mode == "chat" else END_THINK)
    tools = body.tools if body.tool_choice != "none" else None
    if wanted and tools:
        raise ApiError(
            400,
            "an output that must match a format cannot hold tool calls; leave out 'tools' or "
            "'response_format', or say 'tool_choice': 'none'.",
            param="tools",
        )
    prompt = chat.encode(
        body.messages, mode, tools=tools or None, response_format=_prompted(body.response_format)
    )
    _check_last(body.messages)
    service.check_prompt(prompt)
    ids = service.encode(prompt)
    options = request_options(
        body,
        service.engine.session,
        service.options,
        ids,
        special_tokens=True,
        constraint=wanted,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    job = new_job("chatcmpl", KINDS, body, [(ids, options)])
    reads = read_mode(body.messages, mode)
    return job, [ChatChoice(i, reads, service.tokens) for i in range(job.n)]


def mode_of(body: Conversation, default: Mode) -> Mode:
    """Return the mode that a request asks for in one of three ways; an explicit no wins."""
    effort = EFFORTS.get(body.reasoning_effort or "")
    thinks = body.chat_template_kwargs.thinking if body.chat_template_kwargs else None
    if body.thinking is not None:
        thinks = body.thinking.type == "enabled"
    if thinks is False:
        return "chat"
    mode = effort or default
    return "thinking" if thinks and mode == "chat" else mode


def read_mode(messages: Any, mode: Mode) -> Mode:
    """Return the mode of the output: what goes on with a turn or does a task has no reasoning."""
    last = _last(messages)
    goes_on = any(last.get(key) for key in ("task", "wo_eos", "prefix"))
    return "chat" if goes_on else mode


def _check(body: ChatRequest) -> None:
    for name, instead in NOT_SUPPORTED.items():
        if getattr(body, name) is not None:
            raise ApiError(400, f"'{name}' is not supported; {instead}.", param=name, code="unsupported")
    if body.modalities not in (None, ["text"]):
        raise ApiError(
            400,
            "'modalities' other than ['text'] are not supported.",
            param="modalities",
            code="unsupported",
        )
    if body.tool_choice not in (None, "auto", "none"):
        raise ApiError(
            400,
            "a 'tool_choice' that forces a call is not supported; say 'auto' or 'none', and ask for the call "
            "in a message.",
            param="tool_choice",
            code="unsupported",
        )


def _check_last(messages: Any) -> None:
    """Refuse a conversation behind which nobody expects the assistant."""
    last = _last(messages)
    if last.get("role") in ASKS or any(last.get(key) for key in ("task", "wo_eos", "prefix")):
        return
    raise ApiError(
        400,
        f"the last message is of role {last.get('role')}, and the assistant speaks behind a message of role "
        f"{', '.join(ASKS)}; add one, or go on with an assistant's message by 'prefix': true on it.",
        param="messages",
    )


def _last(messages: Any) -> Mapping[str, Any]:
    # chat.encode has checked that it is a list of objects, or an object with one.
    turns = messages["messages"] if isinstance(messages, Mapping) else messages
    last = turns[-1]
    return last.to_dict() if isinstance(last, Message) else last


def _prompted(wanted: ResponseFormat | None) -> dict[str, Any] | None:
    """Return the schema that the prompt shows the model."""
    if wanted is None or wanted.type == "text":
        return None
    schema = wanted.json_schema.schema_ if wanted.json_schema and wanted.type == "json_schema" else {}
    return schema or {"type": "object"}
