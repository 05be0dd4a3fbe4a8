"""Integer expressions of launch plans: the one small language that a host without Python must speak.

Names, integers, `+ - * // %`, comparisons (1 or 0), `and`/`or`/`not`, and the functions `cdiv(a, b)`
(division rounded up), `min(...)`, `max(...)` and `where(condition, a, b)`. All values are integers.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Mapping
from types import CodeType
from typing import Any

_NODES = (
    ast.Expression,
    ast.Constant,
    ast.Name,
    ast.Load,
    ast.BinOp,
    ast.Add,
    ast.Sub,
    ast.Mult,
    ast.FloorDiv,
    ast.Mod,
    ast.Compare,
    ast.Lt,
    ast.LtE,
    ast.Gt,
    ast.GtE,
    ast.Eq,
    ast.NotEq,
    ast.BoolOp,
    ast.And,
    ast.Or,
    ast.UnaryOp,
    ast.Not,
    ast.USub,
    ast.Call,
)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _where(condition: int, a: int, b: int) -> int:
    return a if condition else b


FUNCTIONS: Mapping[str, Callable[..., int]] = {"cdiv": _cdiv, "min": min, "max": max, "where": _where}


@functools.cache
def _code(text: str) -> tuple[CodeType, frozenset[str]]:
    tree = ast.parse(text, mode="eval")
    names = set()
    for node in ast.walk(tree):
        if not isinstance(node, _NODES) or (
            isinstance(node, ast.Constant) and not isinstance(node.value, int)
        ):
            raise ValueError(  # noqa: TRY004 - the text is wrong, not its type
                f"launch expression '{text}': {ast.unparse(node)} is not part of the language"
            )
        if isinstance(node, ast.Call) and not (
            isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS and not node.keywords
        ):
            raise ValueError(
                f"launch expression '{text}': {ast.unparse(node)} calls none of {', '.join(FUNCTIONS)}"
            )
        if isinstance(node, ast.Name) and node.id not in FUNCTIONS:
            names.add(node.id)
    return compile(tree, f"<{text}>", "eval"), frozenset(names)


def names(text: str) -> frozenset[str]:
    """Return the symbols of an expression.

    Raises:
        ValueError: the text is not part of the language.
    """
    return _code(text)[1]


def evaluate(text: str, symbols: Mapping[str, Any]) -> int:
    """Return the value of an expression as an int.

    Raises:
        ValueError: the text is not part of the language, or a symbol has no value.
    """
    try:
        value: int = eval(_code(text)[0], {"__builtins__": {}, **FUNCTIONS}, dict(symbols))
    except NameError as error:
        raise ValueError(f"launch expression '{text}': {error}") from None
    return int(value)
