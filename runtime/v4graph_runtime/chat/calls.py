"""The text of one call's arguments, written as its parameters arrive."""

from __future__ import annotations

import json
from typing import Any

from v4graph_runtime.chat.message import ToolCall


class CallWriter:
    """Parameters to the text of a JSON object; every method returns what it appends to that text.

    The value of a string is written as it arrives, any other once it is whole and proves to be JSON.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._parameters: set[str] = set()
        self._arguments: list[str] = []
        self._key = ""
        self._string: bool | None = None
        self._value: list[str] = []

    @property
    def call(self) -> ToolCall:
        """The call with the arguments written so far."""
        return ToolCall(self.name, "".join(self._arguments))

    def has(self, parameter: str) -> bool:
        return parameter in self._parameters

    def open(self) -> str:
        return self._write("{")

    def begin(self, parameter: str, string: bool | None) -> str:
        """Begin a parameter; `string` None is one that does not say what its value is."""
        comma = ", " if self._parameters else ""
        self._parameters.add(parameter)
        self._key = f"{comma}{_dump(parameter)}: "
        self._string, self._value = string, []
        return self._write(self._key + '"') if string else ""

    def text(self, piece: str) -> str:
        """Go on with the parameter's value."""
        if self._string:
            return self._write(_dump(piece)[1:-1])
        self._value.append(piece)
        return ""

    def end(self) -> tuple[str, bool]:
        """End the parameter; return also False if its value said to be JSON and is none.

        Such a value is written as a string.
        """
        if self._string:
            return self._write('"'), True
        value = "".join(self._value)
        valid = _is_json(value)
        return self._write(self._key + (value if valid else _dump(value))), valid or self._string is None

    def close(self) -> str:
        return self._write("}")

    def _write(self, text: str) -> str:
        self._arguments.append(text)
        return text


def _dump(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _is_json(text: str) -> bool:
    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    try:
        json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return False
    return True
