"""uvicorn around the application: a socket that is bound early, and a shutdown that finishes what runs."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from v4graph.errors import EngineError
from v4graph_runtime.serving.service import Service

# What is left for writing answers after the last generation was cancelled.
GRACE_SECONDS = 10


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that nobody can connect to yet; port 0 takes a free one.

    Raises:
        EngineError: the address is in use, or not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With its protocol named, or asyncio does not turn Nagle's algorithm off: 40 ms between small events.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise EngineError(
            f"{host}:{port} cannot be listened on ({reason}); choose another with --host and --port."
        ) from error
    return listener


def url_of(listener: socket.socket) -> str:
    """Return where a browser on this machine finds it."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """Serves until `stop`, SIGTERM or SIGINT; a second signal does not wait for what runs."""

    def __init__(self, app: Starlette, ready: Callable[[], None] = lambda: None) -> None:
        self._service: Service = app.state.service
        self._ready = ready
        drain = self._service.options.drain
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            ws="none",
            http="h11",
            proxy_headers=False,
            timeout_graceful_shutdown=int(drain) + GRACE_SECONDS,
        )
        super().__init__(config)

    def stop(self) -> None:
        """Begin the shutdown; from any thread."""
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # uvicorn's own raises the signal again at the end, but a shutdown that was asked for is no error.
        self.force_exit = self.should_exit and sig in (signal.SIGINT, signal.SIGTERM)
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting, and close connections as their answers end."""
        draining = asyncio.create_task(self._service.drain(self._service.options.drain))
        hurrying = asyncio.create_task(self._hurry())
        try:
            await super().shutdown(sockets)
        finally:
            hurrying.cancel()
            # Connections are closed: what still runs, runs for nobody.
            await self._service.drain(0.0)
            await draining

    async def _hurry(self) -> None:
        while not self.force_exit:
            await asyncio.sleep(0.05)
        await self._service.drain(0.0)
