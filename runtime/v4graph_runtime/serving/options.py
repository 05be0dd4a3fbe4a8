"""What a server is started with."""

from __future__ import annotations

from dataclasses import dataclass

from v4graph_runtime.chat import Mode


@dataclass(frozen=True)
class ServerOptions:
    """Limits and defaults of a server.

    Attributes:
        model_name: What /v1/models names, and requests ask for.
        mode: Of chats that do not say one.
        api_key: What callers must bring; None lets everybody in.
        max_body_bytes, body_seconds: Of a request's body, and of its way here.
        max_tokens: Most new tokens of a request; None for what the engine has room for.
        timeout: Seconds that a request may take; None for no limit.
        drain: Seconds that a shutdown waits for what runs.
        keep_alive: Seconds between the comments of a stream, which keep its connection open.
    """

    model_name: str = "v4graph"
    mode: Mode = "chat"
    api_key: str | None = None
    max_body_bytes: int = 8_000_000
    body_seconds: float = 60.0
    max_tokens: int | None = None
    timeout: float | None = None
    drain: float = 30.0
    keep_alive: float = 15.0
