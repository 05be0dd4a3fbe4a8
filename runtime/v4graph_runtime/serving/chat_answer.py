"""Pieces of a chat's output to the choices of an answer or of a stream's events."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from v4graph_runtime.chat import Delta, Mode, Parser, ToolCall
from v4graph_runtime.chat.format import END_THINK
from v4graph_runtime.request import Piece
from v4graph_runtime.serving.tokens import TokenTexts

Event = dict[str, Any]
KEYS = {"reasoning": "reasoning_content", "content": "content"}


class ChatChoice:
    """Reads one output of the model."""

    def __init__(self, index: int, mode: Mode, tokens: TokenTexts) -> None:
        self._index, self._tokens = index, tokens
        self._parser = Parser(mode)
        self._reasons = mode != "chat"
        self._tail = ""
        self._ids: list[str] = []
        self._logprobs: list[Event] = []
        self._sent = 0  # log probabilities that a stream has sent
        self._finish = "stop"
        self.reasoning_tokens = 0

    def begin(self) -> list[Event]:
        return [self._event({"role": "assistant", "content": ""})]

    def push(self, piece: Piece) -> list[Event]:
        if piece.logprob is not None:
            self._logprobs.append(self._tokens.chat_logprob(piece.logprob))
        deltas = self._parser.feed(piece.text)
        if piece.token is not None:
            self._count(piece.text, deltas)
        return self._events(deltas)

    def end(self, cut: bool) -> list[Event]:
        deltas = self._parser.finish(ended=not cut)
        message = self._parser.message
        calls = bool(message.tool_calls) and message.partial_call is None
        self._finish = "length" if cut else "tool_calls" if calls else "stop"
        return [*self._events(deltas), self._event({}, self._finish)]

    def whole(self) -> Event:
        message = self._parser.message
        calls = list(message.tool_calls)
        # Half a call is shown where OpenAI shows it: the output was cut off, and finish_reason says so.
        if message.partial_call and self._finish == "length":
            calls.append(message.partial_call)
        content = message.content or (None if calls else "")
        answer: Event = {"role": "assistant", "content": content, "refusal": None}
        if message.reasoning:
            answer["reasoning_content"] = message.reasoning
        if calls:
            answer["tool_calls"] = [self._call(i, call) for i, call in enumerate(calls)]
        return {
            "index": self._index,
            "message": answer,
            "logprobs": _logprobs(self._logprobs),
            "finish_reason": self._finish,
        }

    def _count(self, text: str, deltas: Sequence[Delta]) -> None:
        """Count a token of the reasoning; the one that ends it is one of them."""
        kinds = {delta.kind for delta in deltas}
        if not self._reasons and "reasoning" not in kinds:
            return
        self._reasons = True
        ended = END_THINK in self._tail + text
        self._tail = (self._tail + text)[-len(END_THINK) :]
        if ended or not kinds & {"content", "call"}:
            self.reasoning_tokens += 1
        if ended or kinds & {"content", "call"}:
            self._reasons, self._tail = False, ""

    def _events(self, deltas: Sequence[Delta]) -> list[Event]:
        return [self._event(self._delta(delta)) for delta in deltas]

    def _delta(self, delta: Delta) -> Event:
        if delta.kind in KEYS:
            return {KEYS[delta.kind]: delta.text}
        if delta.kind == "arguments":
            return {"tool_calls": [{"index": delta.index, "function": {"arguments": delta.text}}]}
        call = self._call(delta.index, ToolCall(delta.text, ""))
        return {"tool_calls": [{"index": delta.index, **call}]}

    def _call(self, index: int, call: ToolCall) -> Event:
        while len(self._ids) <= index:
            self._ids.append(f"call_{uuid.uuid4().hex[:24]}")
        return {
            "id": self._ids[index],
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }

    def _event(self, delta: Event, finish: str | None = None) -> Event:
        logprobs, self._sent = self._logprobs[self._sent :], len(self._logprobs)
        return {
            "index": self._index,
            "delta": delta,
            "logprobs": _logprobs(logprobs),
            "finish_reason": finish,
        }


def _logprobs(entries: list[Event]) -> Event | None:
    return {"content": entries, "refusal": None} if entries else None
