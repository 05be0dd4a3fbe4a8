"""The fixed strings of DeepSeek-V4's prompt format.

Source: DeepSeek-V4 encoding/encoding_dsv4.py.
"""

from __future__ import annotations

from typing import Literal, get_args

Mode = Literal["chat", "thinking", "max"]
MODES: tuple[str, ...] = get_args(Mode)

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
REMINDER = "<｜latest_reminder｜>"
THINK = "<think>"
END_THINK = "</think>"

DSML = "｜DSML｜"
OPEN = f"<{DSML}"
CLOSE = f"</{DSML}"

# A quick instruction: the token after the message that asks for it.
TASKS = {name: f"<｜{name}｜>" for name in ("action", "query", "authority", "domain", "title", "read_url")}

# What is one token each in the model's tokenizer.
CONTROL = (BOS, EOS, PAD, USER, ASSISTANT, REMINDER, THINK, END_THINK, DSML, *TASKS.values())

THINK_MAX = (
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    "You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the "
    "root cause, rigorously stress-testing your logic against all potential paths, edge cases, and "
    "adversarial scenarios.\n"
    "Explicitly write out your entire deliberation process, documenting every intermediate step, considered "
    "alternative, and rejected hypothesis to ensure absolutely no assumption is left unchecked.\n\n"
)

TOOLS_BEFORE = f"""## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by writing a \
"{OPEN}tool_calls>" block like the following:

{OPEN}tool_calls>
{OPEN}invoke name="$TOOL_NAME">
{OPEN}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE{CLOSE}parameter>
...
{CLOSE}invoke>
{OPEN}invoke name="$TOOL_NAME2">
...
{CLOSE}invoke>
{CLOSE}tool_calls>

String parameters should be specified as is and set `string="true"`. For all other types (numbers, booleans, \
arrays, objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by {THINK}), you MUST output your complete reasoning inside \
{THINK}...{END_THINK} BEFORE any tool calls or final response.

Otherwise, output directly after {END_THINK} with tool calls or final response.

### Available Tool Schemas

"""
TOOLS_AFTER = (
    "\n\nYou MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.\n"
)
RESPONSE_FORMAT = "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
