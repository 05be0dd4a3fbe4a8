"""What a completion says: reasoning, content and tool calls; whole, and piece by piece."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Channel = Literal["reasoning", "content"]
Kind = Literal["reasoning", "content", "call", "arguments"]


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool; `arguments` is the text of a JSON object.

    `id` is the caller's: the model writes none.
    """

    name: str
    arguments: str
    id: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the call in the form of an assistant message's `tool_calls`."""
        function = {"name": self.name, "arguments": self.arguments}
        return {**({"id": self.id} if self.id else {}), "type": "function", "function": function}


@dataclass(frozen=True)
class Message:
    """An assistant's turn.

    Attributes:
        content, reasoning: Text without markup.
        tool_calls: The calls that the model finished; the arguments of each are valid JSON.
        partial_call: The call in which the text ended; its arguments are the beginning of a JSON object.
        complete: Everything that was opened was closed: reasoning, calls, tags.
        problems: A sentence for each way, the first 20, in which the text was not of the format.
    """

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    partial_call: ToolCall | None = None
    complete: bool = True
    problems: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the message as `encode` takes it; a partial call is left out."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [call.to_dict() for call in self.tool_calls]
        return message


@dataclass(frozen=True)
class Delta:
    """What became certain: text of one kind to append.

    `call` begins tool call number `index`, and its text is the tool's name; `arguments` goes on with the
    JSON text of that call's arguments.
    """

    kind: Kind
    text: str
    index: int = 0
