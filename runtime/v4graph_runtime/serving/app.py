"""The routes: an engine to an ASGI application that speaks OpenAI's API."""

from __future__ import annotations

import asyncio
import dataclasses
import hmac
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from v4graph.errors import near_match
from v4graph_runtime.serving import chat_api, completions_api, token_api
from v4graph_runtime.serving.answer import Answer, Choice
from v4graph_runtime.serving.errors import ApiError, as_api_error, shutting_down
from v4graph_runtime.serving.http import Json, discard, read_body, refusal, while_connected
from v4graph_runtime.serving.job import Job
from v4graph_runtime.serving.options import ServerOptions
from v4graph_runtime.serving.page import page
from v4graph_runtime.serving.service import Service
from v4graph_runtime.serving.sse import EventStream

if TYPE_CHECKING:
    from v4graph_runtime.serving.engine import Engine

Handler = Callable[[Service, Request], Awaitable[Response]]
Prepare = Callable[[Service, bytes], tuple[Job, list[Choice]]]
# What a monitor and a browser open without a key; the page asks for one.
OPEN = ("/", "/health")


def create_app(engine: Engine, options: ServerOptions | None = None) -> Starlette:
    """Return the application of an engine; `app.state.service` is what its routes share.

    The engine stays the caller's to close.
    """
    service = Service(engine, options or ServerOptions())
    routes = [
        _route(service, "POST", "/v1/chat/completions", _generates(chat_api.prepare)),
        _route(service, "POST", "/v1/completions", _generates(completions_api.prepare)),
        _route(service, "GET", "/v1/models", _models),
        _route(service, "GET", "/v1/models/{name:path}", _model),
        _route(service, "POST", "/tokenize", _computes(token_api.tokenize)),
        _route(service, "POST", "/detokenize", _computes(token_api.detokenize)),
        _route(service, "GET", "/health", _health),
        _route(service, "GET", "/metrics", _metrics),
        _route(service, "GET", "/stats", _stats),
        _route(service, "GET", "/", _page),
    ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _no_route(routes)})
    app.router.redirect_slashes = False
    app.state.service = service
    return app


def _route(service: Service, method: str, path: str, handler: Handler) -> Route:
    async def endpoint(request: Request) -> Response:
        try:
            if path not in OPEN:
                await _check_key(service, request)
            return await handler(service, request)
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        except Exception as error:
            return refusal(as_api_error(error, closing=service.closing))

    return Route(path, endpoint, methods=[method])


async def _check_key(service: Service, request: Request) -> None:
    key = service.options.api_key
    if key is None:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    given = given.strip() if scheme.lower() == "bearer" else ""
    # Headers are read as Latin-1, whatever was sent.
    if hmac.compare_digest(given.encode("latin-1"), key.encode()):
        return
    if request.method == "POST":
        await discard(request)
    said = "this API key is not the server's" if given else "no API key"
    raise ApiError(401, f"{said}; send the header 'Authorization: Bearer KEY'.", code="invalid_api_key")


def _generates(prepare: Prepare) -> Handler:
    def begin(service: Service, data: bytes) -> tuple[Job, Answer]:
        job, choices = prepare(service, data)
        return job, Answer(service, job, choices)

    async def handler(service: Service, request: Request) -> Response:
        data = await _body(service, request)
        if service.closing:
            raise shutting_down()
        # Long prompts and large schemas take their time: not in the event loop.
        job, answer = await asyncio.to_thread(begin, service, data)
        if job.stream:
            return EventStream(answer.events(), answer.close)
        try:
            return Json(await while_connected(request.receive, answer.whole()))
        finally:
            answer.close()

    return handler


def _computes(compute: Callable[[Service, bytes], dict[str, Any]]) -> Handler:
    async def handler(service: Service, request: Request) -> Response:
        return Json(await asyncio.to_thread(compute, service, await _body(service, request)))

    return handler


async def _body(service: Service, request: Request) -> bytes:
    options = service.options
    try:
        return await read_body(request, options.max_body_bytes, options.body_seconds, service.arriving)
    except ApiError as error:
        # A shutdown does not wait for a body that may never come.
        raise (shutting_down() if service.closing else error) from error


async def _models(service: Service, request: Request) -> Response:
    return Json({"object": "list", "data": [_described(service)]})


async def _model(service: Service, request: Request) -> Response:
    service.check_model(request.path_params["name"])
    return Json(_described(service))


def _described(service: Service) -> dict[str, Any]:
    return {
        "id": service.options.model_name,
        "object": "model",
        "created": service.created,
        "owned_by": "v4graph",
        "max_model_len": service.engine.session.capacity,
    }


async def _health(service: Service, request: Request) -> Response:
    if service.closing:
        raise ApiError(503, "the server is shutting down.", code="shutting_down")
    return Json({"status": "ok"})


async def _metrics(service: Service, request: Request) -> Response:
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _stats(service: Service, request: Request) -> Response:
    stats = dataclasses.asdict(service.engine.stats())
    return Json({"model": service.options.model_name, "mode": service.options.mode, **stats})


async def _page(service: Service, request: Request) -> Response:
    text, headers = page()
    return Response(text, media_type="text/html; charset=utf-8", headers=headers)


def _no_route(routes: list[Route]) -> Callable[[Request, Exception], Awaitable[Response]]:
    paths = [route.path for route in routes]

    async def handler(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        await discard(request)
        path = request.url.path
        if error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "")
            answer = refusal(ApiError(405, f"{path} takes {allowed}, not {request.method[:20]}."))
            answer.headers["Allow"] = allowed
            return answer
        near = near_match(path, paths) or f"; there are {', '.join(paths)}."
        return refusal(ApiError(404, f"no route {path[:100]!r}{near}", code="unknown_route"))

    return handler
