"""What went wrong to the body and status of OpenAI's API."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from v4graph.errors import BusyError, ChatError, SessionError, near_match

logger = logging.getLogger(__name__)

MOST_PROBLEMS = 5
RETRY_SECONDS = 1
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 504: "timeout_error"}


class ApiError(Exception):
    """An answer that is a refusal: a status, a sentence, and the field that it is about."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code

    @property
    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        headers = {"Retry-After": str(RETRY_SECONDS)} if self.status in (429, 503) else {}
        return {**headers, "WWW-Authenticate": "Bearer"} if self.status == 401 else headers


def shutting_down() -> ApiError:
    return ApiError(503, "the server is shutting down; ask again later.", code="shutting_down")


def as_api_error(error: Exception, *, closing: bool) -> ApiError:
    """Return the answer to a request that failed; what is not the caller's doing goes to the log."""
    match error:
        case ApiError():
            return error
        case BusyError() if closing:
            return shutting_down()
        case BusyError():
            return ApiError(429, str(error), code="queue_full")
        case ChatError():
            return ApiError(400, str(error), param="messages")
        case SessionError():
            return ApiError(400, str(error))
    number = uuid.uuid4().hex[:12]
    logger.error("internal error %s", number, exc_info=error)
    return ApiError(500, f"internal error {number}; the server's log has the details.", code="internal_error")


def invalid(error: ValidationError, model: type[BaseModel]) -> ApiError:
    """Return what pydantic found, in sentences: 400 for a body that is not JSON, else 422."""
    problems = error.errors(include_url=False)
    first = problems[0]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "no more is known")
        return ApiError(400, f"the body is not valid JSON: {reason}.", code="invalid_json")
    sentences = list(dict.fromkeys(_sentence(problem, model) for problem in problems))
    shown = sentences[:MOST_PROBLEMS]
    if len(sentences) > len(shown):
        shown.append(f"There are {len(sentences) - len(shown)} more problems.")
    return ApiError(422, " ".join(shown), param=_place(first) or None, code="invalid_value")


def _sentence(problem: Mapping[str, Any], model: type[BaseModel]) -> str:
    place, kind = _place(problem), problem["type"]
    if kind == "extra_forbidden":
        near = near_match(place, _fields(model, problem["loc"][:-1]))
        return f"Unknown field '{_cut(place)}'{near or '; leave it out.'}"
    if kind == "missing":
        return f"'{place}' is missing."
    if kind == "value_error":
        return f"{place}: {problem['ctx']['error']}" if place else str(problem["ctx"]["error"])
    expected = problem["msg"].replace("Input should be", "expected").rstrip(".")
    return f"{place or 'The body'} is {_short(problem['input'])}, {expected[0].lower()}{expected[1:]}."


def _fields(model: type[BaseModel], place: tuple[str | int, ...]) -> list[str]:
    """Return the names known where an unknown one stands; none below fields that are no models."""
    for name in place:
        field = model.model_fields.get(str(name))
        found = [one for one in _models(field.annotation) if field] if field else []
        if not found:
            return []
        model = found[0]
    return [field.alias or name for name, field in model.model_fields.items()]


def _models(annotation: Any) -> list[type[BaseModel]]:
    kinds = getattr(annotation, "__args__", (annotation,))
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]


def _place(problem: Mapping[str, Any]) -> str:
    return ".".join(map(str, problem["loc"]))


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "an object"
    return "a list" if isinstance(value, list | tuple) else _cut(repr(value))


def _cut(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
