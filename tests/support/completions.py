"""Completions of a chat model to parse: valid ones, and ones spoilt as models and cuts spoil them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

from v4graph_runtime import chat

EOS = "<｜end▁of▁sentence｜>"
CALLS = """

<｜DSML｜tool_calls>
<｜DSML｜invoke name="tide">
<｜DSML｜parameter name="harbour" string="true">Brest, "the old" \\ 港</｜DSML｜parameter>
<｜DSML｜parameter name="days" string="false">[1, {"k": null}]</｜DSML｜parameter>
</｜DSML｜invoke>
<｜DSML｜invoke name="now">

</｜DSML｜invoke>
</｜DSML｜tool_calls>"""
VALID = (
    f"Two calls.</think>I look it up.{CALLS}{EOS}",
    f"I look it up.{CALLS}{EOS}",
    f"</think>{CALLS}{EOS}",
    f"If a < b, </b> and <｜ are no markup.\n\n\n{EOS}",
    f"<think>Again.</think>Yes.\n{EOS}",
)
# What must never be shown.
MARKUP = (
    *("<think>", "</think>", EOS, "<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜action｜>"),
    *("｜DSML｜", "<｜DSML｜", "</｜DSML｜"),
)
STRAY = (
    *MARKUP,
    *("<｜DSML｜tool_calls>", "</｜DSML｜tool_calls>", '<｜DSML｜invoke name="f">', "</｜DSML｜invoke>"),
    *("<｜DSML｜invoke>", "<｜DSML｜invoke name=f", '<｜DSML｜parameter name="harbour" string="false">'),
    *('<｜DSML｜parameter name="x">', "</｜DSML｜parameter>", "</｜DSML｜parameter", "<｜DSML｜tool_result>"),
    *("\n", "\n\n", " ", '"', ">", "<", "｜", "{", "NaN", "x", "[" * 5000),
)


def spoilt(rng: random.Random) -> str:
    """Return a completion cut anywhere, with parts lost, repeated, nested, or strewn with stray tokens."""
    text = rng.choice(VALID)
    for _ in range(rng.randint(1, 4)):
        start = rng.randint(0, len(text))
        end = min(len(text), start + rng.randint(0, 60))
        text = rng.choice(
            (
                text[:start],
                text[:start] + text[end:],
                text[:end] + text[start:],
                text[:start] + rng.choice(STRAY) + text[start:],
                text[:start] + rng.choice(STRAY) + text[end:],
                text[:start] + rng.choice(VALID) + text[start:],
            )
        )
    return text


def pieces(text: str, rng: random.Random) -> Iterator[str]:
    while text:
        size = rng.choice((1, 1, 2, 3, 8, 40))
        yield text[:size]
        text = text[size:]


def streamed(text: str, mode: chat.Mode, rng: random.Random) -> tuple[chat.Message, list[chat.Delta]]:
    """Return the message and the deltas of a text fed in random pieces."""
    parser = chat.Parser(mode)
    deltas = [delta for piece in pieces(text, rng) for delta in parser.feed(piece)]
    deltas += parser.finish()
    return parser.message, deltas


def check(message: chat.Message, deltas: list[chat.Delta]) -> None:
    """The deltas add up to the message; finished calls have valid arguments; no markup is shown."""
    for kind, text in (("content", message.content), ("reasoning", message.reasoning)):
        assert "".join(delta.text for delta in deltas if delta.kind == kind) == text
        assert not [mark for mark in MARKUP if mark in text], text
    calls = [*message.tool_calls, *([message.partial_call] if message.partial_call else [])]
    assert [delta.text for delta in deltas if delta.kind == "call"] == [call.name for call in calls]
    for index, call in enumerate(calls):
        texts = [delta.text for delta in deltas if delta.kind == "arguments" and delta.index == index]
        assert "".join(texts) == call.arguments
    for call in message.tool_calls:
        assert isinstance(json.loads(call.arguments), dict)
    assert all(delta.text for delta in deltas)
