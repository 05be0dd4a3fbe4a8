"""Conversations to prompts and completions to messages, in DeepSeek-V4's official format.

`encode` writes a prompt, `parse` reads what the model writes behind it, and `Parser` does so while it is
written. Text in, text out: no tokenizer and no model is needed.
"""

from v4graph.errors import ChatError
from v4graph_runtime.chat.encode import encode, missing_tokens
from v4graph_runtime.chat.format import MODES, Mode
from v4graph_runtime.chat.message import Delta, Message, ToolCall
from v4graph_runtime.chat.parser import Parser, parse

__all__ = [
    "MODES",
    "ChatError",
    "Delta",
    "Message",
    "Mode",
    "Parser",
    "ToolCall",
    "encode",
    "missing_tokens",
    "parse",
]
