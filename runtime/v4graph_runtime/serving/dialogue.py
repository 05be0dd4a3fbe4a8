"""A conversation with a model, turn by turn, that can be saved with the state behind it."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from v4graph.errors import SessionError
from v4graph_runtime import chat
from v4graph_runtime.request import RequestOptions
from v4graph_runtime.serving.engine import Engine
from v4graph_runtime.snapshot import Snapshot

NOTE = "dialogue"
# A snapshot is of slot 0, so a dialogue has an engine of one slot for itself.
SLOT = 0


@dataclass
class Dialogue:
    """What was said, and an engine of one slot that goes on from there.

    Attributes:
        engine: Its session has one slot, and nobody else submits to it.
        options: How answers are sampled; `max_new_tokens` is lowered to the room that is left.
        mode: "chat", "thinking" or "max".
        messages: The turns so far, as `chat.encode` takes them.
    """

    engine: Engine
    options: RequestOptions
    mode: chat.Mode = "chat"
    messages: list[dict[str, Any]] = field(default_factory=list)

    def prompt(self, text: str) -> list[int]:
        """Return the token ids that the model would read if the user said `text`.

        Raises:
            ChatError: messages that cannot be encoded.
        """
        return self.engine.tokenizer.encode(chat.encode([*self.messages, _user(text)], self.mode))

    def say(self, text: str) -> Reply:
        """Say something and return the answer to come; the messages grow when it has been read.

        Raises:
            ChatError: messages that cannot be encoded.
            SessionError: no room for the prompt and a token behind it.
        """
        ids = self.prompt(text)
        room = self.engine.session.capacity - len(ids) + 1
        options = replace(
            self.options,
            max_new_tokens=max(1, min(self.options.max_new_tokens, room)),
            special_tokens=True,
        )
        return Reply(self, text, ids, options)

    def forget(self) -> None:
        """Start over; what the system was told stays."""
        self.messages = [message for message in self.messages if message["role"] == "system"]

    def save(self, path: Path) -> int:
        """Write the messages and the state to one file; return its bytes.

        Raises:
            SessionError: the file cannot be written.
        """
        notes = {NOTE: json.dumps({"messages": self.messages, "mode": self.mode}, ensure_ascii=False)}
        self.engine.session.snapshot(SLOT, notes=notes).save(path)
        return path.stat().st_size

    def load(self, path: Path) -> None:
        """Go on from a file of `save`, without reading its messages again.

        Raises:
            SessionError: no such file, a damaged one, or one of another engine or model.
        """
        snapshot = Snapshot.load(path)
        try:
            saved = json.loads(snapshot.notes[NOTE])
        except KeyError as error:
            raise SessionError(
                f"{path}: a snapshot without a conversation; restore it with Session.restore."
            ) from error
        self.engine.session.restore(snapshot, SLOT)
        self.messages, self.mode = saved["messages"], saved["mode"]


class Reply(Iterator[chat.Delta]):
    """An answer as it is made; `message` holds what has been read of it.

    Reading goes on where it was, also after a KeyboardInterrupt.
    """

    def __init__(self, dialogue: Dialogue, text: str, ids: list[int], options: RequestOptions) -> None:
        self._dialogue, self._text = dialogue, text
        self._parser = chat.Parser(dialogue.mode)
        self._deltas: deque[chat.Delta] = deque()
        self._ended = False
        self.generation = dialogue.engine.submit(ids, options)

    @property
    def message(self) -> chat.Message:
        return self._parser.message

    def cancel(self) -> None:
        """Stop; what was made so far still comes, and counts as said."""
        self.generation.cancel()

    def message_at_end(self) -> chat.Message:
        """Wait for the end and return the whole message."""
        for _ in self:
            pass
        return self.message

    def __next__(self) -> chat.Delta:
        """Wait for the next part.

        Raises:
            EngineError: the engine failed; nothing was added to the messages.
        """
        while not self._deltas and not self._ended:
            piece = next(self.generation, None)
            if piece is None and self.generation.finish == "error":
                break  # it was raised before, and what there is counts as not said
            self._deltas += self._parser.feed(piece.text) if piece else self._end()
        if not self._deltas:
            raise StopIteration
        return self._deltas.popleft()

    def _end(self) -> list[chat.Delta]:
        rest = self._parser.finish(ended=self.generation.finish == "stop")
        self._dialogue.messages += [_user(self._text), self.message.to_dict()]
        self._ended = True
        return rest


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}
