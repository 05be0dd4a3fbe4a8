"""What the routes share: the engine loop, the options, and who is told about finished requests."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from v4graph.errors import near_match
from v4graph_runtime.chat import missing_tokens
from v4graph_runtime.serving.errors import ApiError
from v4graph_runtime.serving.metrics import Metrics
from v4graph_runtime.serving.options import ServerOptions
from v4graph_runtime.serving.tokens import TokenTexts

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from v4graph_runtime.serving.engine import Engine
    from v4graph_runtime.serving.generation import Generation


class Service:
    """One engine, served. `closing` is set when a shutdown begins."""

    def __init__(self, engine: Engine, options: ServerOptions) -> None:
        self.engine = engine
        self.options = options
        self.tokens = TokenTexts(engine.tokenizer)
        self.metrics = Metrics(engine)
        self.closing = False
        self.arriving: set[asyncio.Timeout] = set()  # of bodies on their way here
        self.created = int(time.time())
        self._warned = False

    def check_model(self, name: str | None) -> None:
        """Refuse another model than the one that is here."""
        known = self.options.model_name
        if name not in (None, known):
            near = near_match(str(name), [known])
            raise ApiError(
                404,
                f"there is no model {str(name)[:60]!r} here{near or f'; this server has {known!r}.'}",
                param="model",
                code="model_not_found",
            )

    def check_prompt(self, prompt: str) -> None:
        """Warn, once, of a tokenizer that spells the chat's control tokens in letters."""
        if self._warned:
            return
        if missing := missing_tokens(prompt, self.engine.tokenizer):
            self._warned = True
            logger.warning("this model is none for chat: its tokenizer has no token %s", ", ".join(missing))

    def encode(self, text: str, *, start: bool = True) -> list[int]:
        """Return token ids.

        Raises:
            ApiError: the tokenizer gives none.
        """
        ids = self.engine.tokenizer.encode(text, start=start)
        if not ids:
            raise ApiError(400, "the prompt is empty; give some text.", param="prompt")
        return ids

    def check_ids(self, ids: Sequence[int], param: str) -> None:
        """Refuse token ids that the model does not have."""
        most = self.engine.session.vocab_size - 1
        for token in ids:
            if token > most:
                raise ApiError(
                    400, f"{param}: token {token} does not exist, expected 0 to {most}.", param=param
                )

    def finished(self, id_: str, one: Generation) -> None:
        """Note a request that has ended."""
        self.metrics.observe(one)
        logger.info(
            "%s: %d prompt tokens (%d cached), %d new, %s, first after %.3f s, %.3f s in all",
            *(id_, one.prompt_tokens, one.cached_tokens, one.new_tokens),
            *(one.finish, one.time_to_first_token, one.seconds),
        )

    async def drain(self, seconds: float) -> None:
        """Take nothing new, wait for what runs, then cancel the rest; what it has is its answer."""
        self.closing = True
        while self.arriving:
            self.arriving.pop().reschedule(0)
        await asyncio.to_thread(self.engine.close, seconds)
