"""Generated text, in pieces of any size, to reasoning, content and tool calls.

Source: DeepSeek-V4 encoding/encoding_dsv4.py, parse_message_from_completion_text. That one refuses text
that is not exactly of the format; this one reads on and says what was wrong.
"""

from __future__ import annotations

from typing import Literal

from v4graph.errors import ChatError
from v4graph_runtime.chat.calls import CallWriter
from v4graph_runtime.chat.checks import check_mode, kind_of
from v4graph_runtime.chat.format import CLOSE, CONTROL, END_THINK, EOS, OPEN, REMINDER, THINK, USER, Mode
from v4graph_runtime.chat.markup import Marks, Tag, split_tag
from v4graph_runtime.chat.message import Channel, Delta, Message
from v4graph_runtime.chat.output import Output

# A value holds anything but its end, even other tags; elsewhere every control token is markup.
IN_VALUE = Marks(f"{CLOSE}parameter", EOS)
ELSEWHERE = Marks(*CONTROL, OPEN, CLOSE)
# Every mark copies what is behind it, so a long text is read in pieces.
PIECE = 4096
# Behind these somebody else speaks.
OTHER_TURNS = (USER, REMINDER)


class Parser:
    """Reads one completion: what the model writes behind a prompt of `encode`.

    No text makes it fail. A delta is never taken back, and the message does not depend on how the text
    was cut into pieces.
    """

    def __init__(self, mode: Mode = "chat") -> None:
        """Start behind a prompt of `mode`; the output of a quick instruction is read in chat mode.

        Raises:
            ChatError: an unknown mode.
        """
        self._channel: Channel = "content" if check_mode(mode) == "chat" else "reasoning"
        self._state: Literal["text", "block", "call", "value", "end"] = "text"
        self._output = Output()
        self._rest = ""
        self._tag = ""  # the opening mark of a tag that has not ended yet
        self._block = False  # calls stand in <｜DSML｜tool_calls>, as they should
        self._writer: CallWriter | None = None  # None inside a call without a name
        self._value: CallWriter | None = None  # None inside a value that is left out
        self._around: Literal["text", "block", "call"] = "text"  # the state behind the value
        self._joint = False  # something was left out since the last text
        self._complete = False

    @property
    def message(self) -> Message:
        """What has been read so far; `complete` is False before `finish`."""
        return self._output.message(self._writer, self._complete)

    def feed(self, text: str) -> list[Delta]:
        """Read a piece of text; return what became certain by it.

        Raises:
            ChatError: not a string.
        """
        if not isinstance(text, str):
            raise ChatError(f"a completion is {kind_of(text)}, expected text; decode its tokens first.")
        for start in range(0, len(text), PIECE):
            self._rest += text[start : start + PIECE]
            while self._step():
                pass
        return self._output.take()

    def finish(self, *, ended: bool = False) -> list[Delta]:
        """Return what was held back because markup might have followed; nothing follows.

        `ended` says that the model ended its turn by a token that is no part of the text.
        """
        if ended:
            return [*self.feed(EOS), *self.finish()]
        if self._state != "end":
            # Where the text ends unfinished, what looks like the beginning of a mark is one.
            shown = self._state == "text" and self._channel == "content" and "｜" not in self._rest
            cut = bool(self._tag) or (not shown and bool(self._rest))
            if cut:
                self._output.problem("the text ends inside a tag")
                self._output.begin_calls()
            else:
                self._read_text(self._rest)
            self._end(cut)
        return self._output.take()

    def _step(self) -> bool:
        """Read up to the next mark, or the tag behind it; return False when more text is needed."""
        if self._state == "end":
            self._rest = ""
            return False
        if self._tag:
            found = split_tag(self._rest)
            if found is None:
                return False
            mark, self._tag = self._tag, ""
            tag, self._rest = found
            self._read_tag(mark, tag)
            return True
        before, mark, self._rest = (IN_VALUE if self._state == "value" else ELSEWHERE).split(self._rest)
        self._read_text(before)
        if mark:
            self._read_mark(mark)
        return bool(mark)

    def _read_text(self, text: str) -> None:
        if self._state == "text":
            # What is left of two marks must not join to a third.
            joint = self._joint and text and ELSEWHERE.split(self._output.tail)[2]
            self._output.text(self._channel, f" {text}" if joint else text)
            self._joint = self._joint and not text
        elif self._state == "value":
            if self._value:
                self._output.arguments(self._value.text(text))
        elif text.strip():
            self._output.problem("text between the tags of the tool calls, left out")

    def _read_mark(self, mark: str) -> None:
        self._joint = True
        if mark == EOS:
            self._end()
        elif mark in (OPEN, CLOSE):
            self._tag = mark
        elif mark.startswith(CLOSE):  # the end of a value, up to its kind
            self._tag, self._rest = CLOSE, mark.removeprefix(CLOSE) + self._rest
        elif mark in OTHER_TURNS:
            self._output.problem(f"'{mark}' begins another turn, the text from there on is left out")
            self._end()
        elif mark == END_THINK and self._state == "text" and self._channel == "reasoning":
            self._output.end_text("reasoning")
            self._channel = "content"
        elif mark == THINK and self._state == "text" and self._output.is_empty(self._channel):
            self._think()
        else:
            self._output.problem(f"'{mark}' out of place, left out")

    def _think(self) -> None:
        """Read '<think>' before anything else: again what the prompt said, or unasked for."""
        self._output.begin_calls()
        if self._channel == "content":
            self._output.problem(f"'{THINK}' where content was expected, read as reasoning")
        self._channel = "reasoning"

    def _read_tag(self, mark: str, tag: Tag) -> None:
        if not tag.closed:
            self._output.problem("a tag without its '>'")
        if self._state == "value":
            self._end_value()
            return
        match mark, tag.kind, self._state:
            case "<｜DSML｜", "tool_calls", "text":
                self._block = True
                self._output.begin_calls()
                self._state = "block"
            case "<｜DSML｜", "invoke", _:
                self._begin_call(tag.name)
            case "<｜DSML｜", "parameter", "text" | "block" | "call":
                self._begin_value(tag, self._state)
            case "</｜DSML｜", "invoke", "call":
                self._end_call()
            case "</｜DSML｜", "tool_calls", "block":
                self._end_block()
            case "</｜DSML｜", "tool_calls", "call":
                self._output.problem("a call that ends without its tag")
                self._end_call()
                self._end_block()
            case _:
                self._output.problem(f"'{mark}{tag.kind[:20]}>' out of place, left out")

    def _begin_call(self, name: str | None) -> None:
        if self._state == "text":
            self._output.problem("a call outside of tool_calls")
            self._output.begin_calls()
            self._block = False
        elif self._state == "call":
            self._output.problem("a call that ends without its tag")
            self._end_call()
        self._state = "call"
        if name:
            self._writer = CallWriter(name)
            self._output.open_call(self._writer)
        else:
            self._output.problem("a call without a name, left out")

    def _end_call(self) -> None:
        if self._writer:
            self._output.close_call(self._writer)
            self._writer = None
        if self._block:
            self._state = "block"
        else:
            self._end_block()

    def _end_block(self) -> None:
        self._output.end_calls()
        self._state = "text"

    def _begin_value(self, tag: Tag, around: Literal["text", "block", "call"]) -> None:
        self._around, self._state, self._value = around, "value", None
        if around != "call":
            self._output.problem("a parameter outside of a call, left out")
        elif tag.name is None:
            self._output.problem("a parameter without a name, left out")
        elif self._writer and self._writer.has(tag.name):
            self._output.problem(f"parameter {tag.name!r} twice in a call, the second left out")
        elif self._writer:
            if tag.string is None:
                self._output.problem(f"parameter {tag.name!r} does not say whether it is a string")
            self._value = self._writer
            self._output.arguments(self._value.begin(tag.name, tag.string))

    def _end_value(self) -> None:
        self._state = self._around
        if self._value:
            text, valid = self._value.end()
            self._output.arguments(text)
            if not valid:
                self._output.problem("a parameter that is not JSON, read as a string")

    def _end(self, cut: bool = False) -> None:
        self._complete = self._state == "text" and self._channel == "content" and not cut
        if self._state == "text":
            self._output.end_text(self._channel)
        self._state, self._rest = "end", ""


def parse(text: str, mode: Mode = "chat") -> Message:
    """Return the message that a completion is; text that is not of the format gives what there is of one.

    Raises:
        ChatError: an unknown mode, or `text` is not a string.
    """
    parser = Parser(mode)
    parser.feed(text)
    parser.finish()
    return parser.message
