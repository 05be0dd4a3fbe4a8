"""A request's fields to what the engine loop is asked for."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from v4graph_runtime.generate import stop_tokens
from v4graph_runtime.request import Constraint, RequestOptions
from v4graph_runtime.sampling_options import SamplingOptions
from v4graph_runtime.serving.errors import ApiError
from v4graph_runtime.serving.options import ServerOptions
from v4graph_runtime.serving.schema import Generate, ResponseFormat

if TYPE_CHECKING:
    from v4graph_runtime.session import Session

Kinds = tuple[str, str]


@dataclass(frozen=True)
class Job:
    """Prompts to go on from, each `n` times, and how to answer.

    Attributes:
        id, kinds: Of the answer; a whole one and an event of a stream name their kind.
        prompts: Token ids, and how to go on from them; choices of a prompt differ in their seeds.
    """

    id: str
    kinds: Kinds
    prompts: tuple[tuple[list[int], RequestOptions], ...]
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    usage_everywhere: bool = False


def new_job(
    prefix: str, kinds: Kinds, body: Generate, prompts: list[tuple[list[int], RequestOptions]]
) -> Job:
    said = body.stream_options
    return Job(
        id=f"{prefix}-{uuid.uuid4().hex}",
        kinds=kinds,
        prompts=tuple(prompts),
        n=body.n or 1,
        stream=bool(body.stream),
        include_usage=bool(said and said.include_usage),
        usage_everywhere=bool(said and said.continuous_usage_stats),
    )


def request_options(
    body: Generate, session: Session, options: ServerOptions, prompt: list[int], **more: Any
) -> RequestOptions:
    """Return what the loop is asked for; `more` are fields that only one of the APIs has.

    Raises:
        ApiError: no room, or more tokens than this server gives.
        SessionError: a value out of range.
    """
    return RequestOptions(
        max_new_tokens=_new_tokens(body, session, options, len(prompt)),
        sampling=_sampling(body, session),
        stop=tuple(body.stop or ()),
        stop_ids=_stop_ids(body, session),
        timeout=options.timeout,
        **more,
    )


def _new_tokens(body: Generate, session: Session, options: ServerOptions, prompt: int) -> int:
    asked = getattr(body, "max_completion_tokens", None) or body.max_tokens
    room = session.capacity - prompt + 1  # the last new token is never fed back
    if prompt > session.capacity or (asked or 0) > room:
        wanted = f" and max_tokens {asked}" if asked else ""
        raise ApiError(
            400,
            f"the prompt has {prompt} tokens{wanted}, the context holds {session.capacity} tokens; "
            "shorten the prompt" + (" or lower max_tokens." if asked else "."),
            param="messages" if hasattr(body, "messages") else "prompt",
            code="context_length_exceeded",
        )
    if asked and options.max_tokens and asked > options.max_tokens:
        raise ApiError(
            400,
            f"max_tokens is {asked}, this server gives at most {options.max_tokens}; lower it.",
            param="max_tokens",
            code="max_tokens_exceeded",
        )
    return int(asked or min(room, options.max_tokens or room))


def _sampling(body: Generate, session: Session) -> SamplingOptions:
    bias = body.logit_bias or {}
    for token in bias:
        if not 0 <= token < session.vocab_size:
            raise ApiError(
                400,
                f"logit_bias: token {token} does not exist, expected 0 to {session.vocab_size - 1}.",
                param="logit_bias",
            )
    return SamplingOptions(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(body.top_k or 0, 0),
        min_p=body.min_p or 0.0,
        repetition_penalty=body.repetition_penalty or 1.0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        seed=body.seed,
        logit_bias=bias,
    )


def _stop_ids(body: Generate, session: Session) -> tuple[int, ...] | None:
    given = tuple(body.stop_token_ids or ())
    if body.ignore_eos:
        return given
    return (*stop_tokens(session), *given) if given else None


def constraint(body: Generate, wanted: ResponseFormat | None, after: str = "") -> Constraint | None:
    """Return what the output must match, from either of the fields that say it.

    Raises:
        ApiError: both do.
    """
    if wanted is not None and wanted.type == "text":
        wanted = None
    said = body.structured_outputs
    if said is not None and wanted is not None:
        raise ApiError(
            400,
            "response_format and structured_outputs both say what the output must match; leave one out.",
            param="structured_outputs",
        )
    if wanted is not None:
        return _formatted(wanted, after)
    if said is None:
        return None
    if said.regex is not None:
        return Constraint("regex", said.regex, after)
    if said.json_ is not None:
        return Constraint("json_schema", json.dumps(said.json_), after)
    return Constraint("json_object", "", after)


def _formatted(wanted: ResponseFormat, after: str) -> Constraint:
    if wanted.json_schema is None or wanted.type == "json_object":
        return Constraint("json_object", "", after)
    return Constraint("json_schema", json.dumps(wanted.json_schema.schema_), after)
