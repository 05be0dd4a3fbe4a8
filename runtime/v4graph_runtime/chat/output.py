"""What a parser has read: texts, calls and problems, and the deltas that were not handed out yet."""

from __future__ import annotations

from v4graph_runtime.chat.calls import CallWriter
from v4graph_runtime.chat.message import Channel, Delta, Kind, Message, ToolCall

MOST_PROBLEMS = 20
# The newlines that the format puts before tool calls are no part of the text.
BEFORE_CALLS = "\n\n"
TAIL = 32  # more than any mark has


class Output:
    """Collects a message; what is appended is never taken back."""

    def __init__(self) -> None:
        self._texts: dict[Channel, list[str]] = {"reasoning": [], "content": []}
        self.tail = ""  # the last characters of the text, to see what would join to them
        self._newlines = ""
        self._after_calls = False
        self._calls: list[ToolCall] = []
        self._problems: dict[str, None] = {}
        self._deltas: list[tuple[Kind, int, list[str]]] = []

    def text(self, channel: Channel, text: str) -> None:
        """Append text; its last newlines are held back while calls may follow."""
        if self._after_calls:
            text = text.lstrip()
            if not text:
                return
            self._after_calls = False
            self.problem("text after the tool calls")
            text = (BEFORE_CALLS if self._texts[channel] else "") + text
        self.tail = (self.tail + text)[-TAIL:]
        text = self._newlines + text
        end = max(len(text.rstrip("\n")), len(text) - len(BEFORE_CALLS))
        self._newlines = text[end:]
        self._append(channel, text[:end])

    def end_text(self, channel: Channel) -> None:
        """Append what was held back: no calls follow."""
        self._append(channel, self._newlines)
        self._newlines = self.tail = ""
        self._after_calls = False

    def begin_calls(self) -> None:
        self._newlines = ""

    def end_calls(self) -> None:
        self._after_calls = True

    def is_empty(self, channel: Channel) -> bool:
        """Whether nothing but newlines was said, and no call made."""
        return not self._texts[channel] and not self._calls

    def open_call(self, writer: CallWriter) -> None:
        self._delta("call", writer.name)
        self.arguments(writer.open())

    def arguments(self, text: str) -> None:
        """Go on with the arguments of the call that is open."""
        self._delta("arguments", text)

    def close_call(self, writer: CallWriter) -> None:
        self.arguments(writer.close())
        self._calls.append(writer.call)

    def problem(self, sentence: str) -> None:
        """Note, once, how the text departs from the format."""
        if len(self._problems) < MOST_PROBLEMS:
            self._problems.setdefault(sentence)

    def take(self) -> list[Delta]:
        """Return the deltas since the last time."""
        deltas = [Delta(kind, "".join(texts), index) for kind, index, texts in self._deltas]
        self._deltas = []
        return deltas

    def message(self, open_call: CallWriter | None, complete: bool) -> Message:
        return Message(
            content="".join(self._texts["content"]),
            reasoning="".join(self._texts["reasoning"]),
            tool_calls=tuple(self._calls),
            partial_call=open_call.call if open_call else None,
            complete=complete,
            problems=tuple(self._problems),
        )

    def _append(self, channel: Channel, text: str) -> None:
        if text:
            self._texts[channel].append(text)
            self._delta(channel, text)

    def _delta(self, kind: Kind, text: str) -> None:
        index = len(self._calls) if kind in ("call", "arguments") else 0
        if self._deltas and self._deltas[-1][:2] == (kind, index) and kind != "call":
            self._deltas[-1][2].append(text)
        elif text:
            self._deltas.append((kind, index, [text]))
