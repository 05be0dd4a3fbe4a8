"""A server on a free port in a thread of this process, and what a test asks of it."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2
from openai import OpenAI

from v4graph_runtime.serving.app import create_app
from v4graph_runtime.serving.options import ServerOptions
from v4graph_runtime.serving.server import Server, bind, url_of
from v4graph_runtime.serving.service import Service


class _Server(Server):
    """Keeps its event loop, so that a test can count what is left in it."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        await super().startup(sockets)


@dataclass
class Served:
    url: str
    engine: Any
    server: _Server
    service: Service
    http: httpx2.Client
    key: str = "none"

    def client(self, key: str | None = None) -> OpenAI:
        return OpenAI(
            base_url=f"{self.url}/v1", api_key=key or self.key, max_retries=0, http_client=self.http
        )

    def post(self, path: str, body: Any, **headers: Any) -> httpx2.Response:
        """Send bytes, and what yields them, as they are, anything else as JSON."""
        data = json.dumps(body).encode() if isinstance(body, dict | list) else body
        return self.http.post(path, content=data, headers={"Content-Type": "application/json", **headers})

    def get(self, path: str) -> httpx2.Response:
        return self.http.get(path)

    def raw(self, data: bytes) -> socket.socket:
        """Send bytes over a new connection."""
        host, _, port = self.url.removeprefix("http://").partition(":")
        connection = socket.create_connection((host, int(port)), timeout=20)
        connection.sendall(data)
        return connection

    def tasks(self) -> int:
        """Tasks of the server's event loop, but for the one that counts them."""

        async def count() -> int:
            return len(asyncio.all_tasks()) - 1

        return asyncio.run_coroutine_threadsafe(count(), self.server.loop).result(10)

    def check_alive(self) -> None:
        """Nothing runs or waits for nobody, no task is left behind, and requests are answered."""
        wait_for(lambda: self.engine.stats().running == 0)
        wait_for(lambda: self.tasks() == 1)
        assert self.get("/health").json() == {"status": "ok"}


def wait_for(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


@contextmanager
def serving(engine: Any, **options: Any) -> Iterator[Served]:
    """Serve until the block ends; `options` are those of `ServerOptions`."""
    chosen = ServerOptions(**{"drain": 0.0, **options})
    listener = bind("127.0.0.1", 0)
    app = create_app(engine, chosen)
    server = _Server(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    url = url_of(listener)
    thread.start()
    try:
        wait_for(lambda: server.started)
        # One client, as each one would read all certificates of this machine.
        with httpx2.Client(base_url=url, timeout=20) as http:
            yield Served(url, engine, server, app.state.service, http, chosen.api_key or "none")
    finally:
        server.stop()
        thread.join(30)
        assert not thread.is_alive()
