"""Bodies in and out: read within a limit, written as JSON, and work that ends when nobody listens."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

from pydantic import ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive

from v4graph_runtime.serving.errors import ApiError, invalid
from v4graph_runtime.serving.schema import Body

T = TypeVar("T")
B = TypeVar("B", bound=Body)

# A client that is refused while it still sends may never see why: read on, but not for ever.
DISCARD_BYTES = 64_000_000
DISCARD_SECONDS = 10.0


def dumps(value: Any) -> bytes:
    """Return JSON; half of a surrogate pair, as an error may quote it, becomes a question mark."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode(
        errors="replace"
    )


class Json(Response):
    media_type = "application/json"

    def __init__(self, value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(dumps(value), status, dict(headers or {}))


def refusal(error: ApiError) -> Json:
    return Json(error.body, error.status, error.headers)


async def read_body(request: Request, limit: int, seconds: float, arriving: set[asyncio.Timeout]) -> bytes:
    """Return the body; while it is on its way, its time limit is in `arriving`.

    Raises:
        ApiError: it is too large (413) or does not arrive in time (408).
        ClientDisconnect: nobody is there.
    """
    try:
        async with asyncio.timeout(seconds) as deadline:
            arriving.add(deadline)
            try:
                return await _read(request, limit)
            finally:
                arriving.discard(deadline)
    except TimeoutError as error:
        raise ApiError(408, f"the body did not arrive within {seconds:g} s.") from error


async def _read(request: Request, limit: int) -> bytes:
    declared = request.headers.get("content-length", "")
    size = int(declared) if declared.isdecimal() and len(declared) < 20 else 0
    body, more = bytearray(), True
    while more and size <= limit and len(body) <= limit:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        body += message.get("body", b"")
        more = message.get("more_body", False)
    if size <= limit and len(body) <= limit:
        return bytes(body)
    if more:
        await discard(request)
    got = f"{size:,}" if size else f"more than {limit:,}"
    raise ApiError(
        413, f"the body has {got} bytes, this server takes {limit:,}; send less.", code="body_too_large"
    )


async def discard(request: Request) -> None:
    """Read and forget what a client still sends, within limits."""
    if request.headers.get("expect", "").lower() == "100-continue":
        return
    left = DISCARD_BYTES
    try:
        async with asyncio.timeout(DISCARD_SECONDS):
            while left > 0:
                message = await request.receive()
                left -= len(message.get("body", b""))
                if message["type"] != "http.request" or not message.get("more_body"):
                    return
    except TimeoutError:
        return


def parse(body: bytes, model: type[B]) -> B:
    """Return a checked body.

    Raises:
        ApiError: not UTF-8 or not JSON (400), or not what the model takes (422).
    """
    try:
        body.decode()
    except UnicodeDecodeError as error:
        raise ApiError(
            400, f"the body is not UTF-8: {error.reason} at byte {error.start}.", code="invalid_json"
        ) from error
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise invalid(error, model) from error


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Return what the work returns; cancel it at once if the client goes.

    Raises:
        ClientDisconnect: it went.
    """
    doing, gone = asyncio.create_task(work), asyncio.create_task(_until_gone(receive))
    try:
        await asyncio.wait({doing, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ClientDisconnect
        return doing.result()
    finally:
        doing.cancel()
        gone.cancel()
        await asyncio.gather(doing, gone, return_exceptions=True)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
