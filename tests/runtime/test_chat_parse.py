"""What a completion says is found, and where it is not of the format, said."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from completions import CALLS, EOS

from v4graph_runtime import chat
from v4graph_runtime.chat import Delta, Message, ToolCall

TIDE = ToolCall("tide", '{"harbour": "Brest, \\"the old\\" \\\\ 港", "days": [1, {"k": null}]}')
NOW = ToolCall("now", "{}")

OPEN_VALUE = '<｜DSML｜parameter name="{}" string="{}">'
CUT = '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n'


def value(text: str, string: str = ' string="false"', name: str = 'name="k"') -> str:
    return f"<｜DSML｜parameter {name}{string}>{text}</｜DSML｜parameter>\n"


def block(*invokes: str) -> str:
    return f"\n\n<｜DSML｜tool_calls>\n{''.join(invokes)}</｜DSML｜tool_calls>"


def invoke(*values: str, name: str = ' name="f"') -> str:
    return f"<｜DSML｜invoke{name}>\n{''.join(values)}</｜DSML｜invoke>\n"


@pytest.mark.parametrize(
    ("mode", "text", "message"),
    [
        ("chat", "Yes.", Message("Yes.")),
        ("chat", f"Yes.\n\n{EOS}", Message("Yes.\n\n")),
        ("thinking", f"Why?</think>Yes.{EOS}", Message("Yes.", "Why?")),
        ("max", "\n</think>\n", Message("\n", "\n")),
        ("chat", f"I look.{CALLS}{EOS}", Message("I look.", tool_calls=(TIDE, NOW))),
        ("thinking", f"Why?\n</think>\n{CALLS}", Message("\n", "Why?\n", (TIDE, NOW))),
        ("thinking", "<think>Why?</think>Yes.", Message("Yes.", "Why?")),
        ("chat", "a < b, a <｜ b, <think, </b>, <", Message("a < b, a <｜ b, <think, </b>, <")),
        # A string is as it is, whatever it holds but its own end.
        ("chat", block(invoke(value(" <｜DSML｜invoke>\n</think> ", ' string="true"'))),
         Message(tool_calls=(ToolCall("f", '{"k": " <｜DSML｜invoke>\\n</think> "}'),))),
        ("chat", block(invoke(value("1", name='name="a > b < c"'), name=' name="a>b"')),
         Message(tool_calls=(ToolCall("a>b", '{"a > b < c": 1}'),))),
    ],
)  # fmt: skip
def test_what_the_format_says(mode: chat.Mode, text: str, message: Message) -> None:
    assert chat.parse(text, mode) == message


@pytest.mark.parametrize(
    ("mode", "text", "message"),
    [
        # Reasoning
        ("thinking", "Why?", Message("", "Why?", complete=False)),
        ("chat", "<think>Why?</think>Yes.",
         Message("Yes.", "Why?", problems=("'<think>' where content was expected, read as reasoning",))),
        ("thinking", "Why?</think>Yes.</think> No.",
         Message("Yes. No.", "Why?", problems=("'</think>' out of place, left out",))),
        ("thinking", f"Why?{block(invoke())}</think>Yes.", Message("Yes.", "Why?", (ToolCall("f", "{}"),))),
        # Stray tokens
        ("chat", "a<｜Assistant｜>b", Message("ab", problems=("'<｜Assistant｜>' out of place, left out",))),
        ("chat", "<th<｜action｜>ink>",
         Message("<th ink>", problems=("'<｜action｜>' out of place, left out",))),
        ("chat", "Yes.<｜User｜>And?",
         Message("Yes.", problems=("'<｜User｜>' begins another turn, the text from there on is left out",))),
        ("chat", "a</｜DSML｜tool_calls>b",
         Message("ab", problems=("'</｜DSML｜tool_calls>' out of place, left out",))),
        ("chat", "a<｜DSML｜note>b", Message("ab", problems=("'<｜DSML｜note>' out of place, left out",))),
        # Calls
        ("chat", block() + "Yes.", Message("Yes.", problems=("text after the tool calls",))),
        ("chat", f"a{block(invoke())}\nb",
         Message("a\n\nb", tool_calls=(ToolCall("f", "{}"),), problems=("text after the tool calls",))),
        ("chat", f"a\n{invoke()}",
         Message("a", tool_calls=(ToolCall("f", "{}"),), problems=("a call outside of tool_calls",))),
        ("chat", block('<｜DSML｜invoke name="f">\n', invoke()),
         Message(tool_calls=(ToolCall("f", "{}"),) * 2, problems=("a call that ends without its tag",))),
        ("chat", block('<｜DSML｜invoke name="f">\n'),
         Message(tool_calls=(ToolCall("f", "{}"),), problems=("a call that ends without its tag",))),
        ("chat", block(invoke(value("1"), name=""), invoke()),
         Message(tool_calls=(ToolCall("f", "{}"),), problems=("a call without a name, left out",))),
        ("chat", block("and", invoke()),
         Message(tool_calls=(ToolCall("f", "{}"),),
                 problems=("text between the tags of the tool calls, left out",))),
        ("chat", block('<｜DSML｜invoke name="f"\n</｜DSML｜invoke>'),
         Message(tool_calls=(ToolCall("f", "{}"),), problems=("a tag without its '>'",))),
        # Parameters
        ("chat", block(invoke(value("Brest"))),
         Message(tool_calls=(ToolCall("f", '{"k": "Brest"}'),),
                 problems=("a parameter that is not JSON, read as a string",))),
        ("chat", block(invoke(value("NaN"))),
         Message(tool_calls=(ToolCall("f", '{"k": "NaN"}'),),
                 problems=("a parameter that is not JSON, read as a string",))),
        ("chat", block(invoke(value("Brest", ""))),
         Message(tool_calls=(ToolCall("f", '{"k": "Brest"}'),),
                 problems=("parameter 'k' does not say whether it is a string",))),
        ("chat", block(invoke(value("1"), value("2"))),
         Message(tool_calls=(ToolCall("f", '{"k": 1}'),),
                 problems=("parameter 'k' twice in a call, the second left out",))),
        ("chat", block(invoke(value("1", name=""))),
         Message(tool_calls=(ToolCall("f", "{}"),), problems=("a parameter without a name, left out",))),
        ("chat", "a" + value("1"), Message("a\n", problems=("a parameter outside of a call, left out",))),
        # Cuts
        ("chat", "a\n\n<｜DSML｜tool",
         Message("a", complete=False, problems=("the text ends inside a tag",))),
        ("chat", block(invoke()).removesuffix("</｜DSML｜tool_calls>"),
         Message(tool_calls=(ToolCall("f", "{}"),), complete=False)),
        ("chat", CUT + OPEN_VALUE.format("k", "true") + "Bre",
         Message(partial_call=ToolCall("f", '{"k": "Bre'), complete=False)),
        ("chat", CUT + OPEN_VALUE.format("k", "false") + "[1",
         Message(partial_call=ToolCall("f", "{"), complete=False)),
    ],
)  # fmt: skip
def test_what_is_not_of_the_format_is_read_on_and_said(mode: chat.Mode, text: str, message: Message) -> None:
    assert chat.parse(text, mode) == message


def test_a_cut_call_is_none_of_the_calls_and_not_encoded_again() -> None:
    text = block(invoke(), invoke(value("rm -rf /tmp", ' string="true"')))
    message = chat.parse(text[: text.index("/tmp") + 1])
    assert [call.name for call in message.tool_calls] == ["f"]
    assert message.partial_call is not None and not message.complete
    with pytest.raises(ValueError, match="Unterminated string"):
        json.loads(message.partial_call.arguments)
    assert len(message.to_dict()["tool_calls"]) == 1


def test_nested_json_too_deep_to_read_is_a_string() -> None:
    message = chat.parse(block(invoke(value("[" * 100_000))))
    assert json.loads(message.tool_calls[0].arguments) == {"k": "[" * 100_000}


def test_problems_are_said_once_and_not_without_end() -> None:
    assert len(chat.parse("</think>" * 3).problems) == 1
    assert len(chat.parse("".join(f"<｜DSML｜tag{i}>" for i in range(100))).problems) == 20


def collect(parser: chat.Parser, *texts: str) -> list[list[Delta]]:
    return [parser.feed(text) for text in texts]


def test_deltas_come_as_soon_as_they_are_certain() -> None:
    parser = chat.Parser("thinking")
    assert collect(parser, "Wh", "y?<", "/thi", "nk>Yes", ".\n", "\n<｜DSML", "｜tool_calls>\n") == [
        [Delta("reasoning", "Wh")],
        [Delta("reasoning", "y?")],
        [],
        [Delta("content", "Yes")],
        [Delta("content", ".")],
        [],
        [],
    ]
    assert collect(
        parser, '<｜DSML｜invoke name="f', '">\n', '<｜DSML｜parameter name="k" string="true">a'
    ) == [
        [],
        [Delta("call", "f"), Delta("arguments", "{")],
        [Delta("arguments", '"k": "a')],
    ]
    assert collect(parser, '"<', "/｜DSML｜parameter>\n", OPEN_VALUE.format("l", "false") + "[1,", "2]") == [
        [Delta("arguments", '\\"')],
        [Delta("arguments", '"')],
        [],
        [],
    ]
    assert collect(
        parser, "</｜DSML｜parameter>\n</｜DSML｜invoke>\n", "</｜DSML｜tool_calls>", EOS, "x"
    ) == [
        [Delta("arguments", ', "l": [1,2]}')],
        [],
        [],
        [],
    ]
    assert parser.finish() == [] and parser.message.complete
    assert parser.message.tool_calls == (ToolCall("f", '{"k": "a\\"", "l": [1,2]}'),)


def test_the_end_hands_out_what_was_held_back() -> None:
    parser = chat.Parser()
    assert collect(parser, "a\n", "<th") == [[Delta("content", "a")], []]
    assert parser.finish() == [Delta("content", "\n<th")]
    assert parser.message == Message("a\n<th")


@pytest.mark.parametrize("mark", ["</think>", '<｜DSML｜invoke name="', "<", '">' * 400])
def test_a_long_text_takes_time_in_proportion(mark: str) -> None:
    def seconds(count: int) -> float:
        text: Any = (mark * count)[: 8 * count]
        began = time.perf_counter()
        chat.parse(text)
        return time.perf_counter() - began

    # 400 kB; a quadratic reader takes minutes.
    assert seconds(50_000) < 5
