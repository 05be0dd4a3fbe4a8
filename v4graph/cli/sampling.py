"""The options that say how tokens are chosen, and what the text must match."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from v4graph_runtime import Constraint, GenerateOptions

Command = TypeVar("Command", bound=Callable[..., Any])

_OPTIONS = (
    click.option(
        "--temperature",
        type=float,
        default=0.0,
        show_default=True,
        help="0: always the most likely token; below 1 likely ones become likelier, above 1 the others.",
    ),
    click.option(
        "--top-k",
        type=int,
        default=0,
        show_default=True,
        help="Sample among so many most likely tokens; 0: all.",
    ),
    click.option(
        "--top-p",
        type=float,
        default=1.0,
        show_default=True,
        help="Sample among the fewest tokens that are so likely together; 0.9 leaves out the unlikely tenth.",
    ),
    click.option(
        "--min-p",
        type=float,
        default=0.0,
        show_default=True,
        help="Leave out tokens less likely than this share of the likeliest; 0.05 is one in twenty.",
    ),
    click.option(
        "--repetition-penalty",
        type=float,
        default=1.0,
        show_default=True,
        help="Above 1: tokens of the prompt and the text become less likely; 1.1 is mild.",
    ),
    click.option(
        "--presence-penalty",
        type=float,
        default=0.0,
        show_default=True,
        help="Taken off the logits of tokens that the text has; 0 to 2 is usual.",
    ),
    click.option(
        "--frequency-penalty",
        type=float,
        default=0.0,
        show_default=True,
        help="The same, once for each time that the text has them.",
    ),
    click.option("--seed", type=int, help="Same seed, same text."),
    click.option(
        "--stop", multiple=True, metavar="TEXT", help="End before this text; may be given several times."
    ),
    click.option(
        "--json-schema",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="The text is JSON that this schema accepts; needs the extra `serve`.",
    ),
    click.option(
        "--regex",
        metavar="TEXT",
        help="The whole text matches this regular expression; needs the extra `serve`.",
    ),
)


def sampling_options(command: Command) -> Command:
    """Add the options of this module to a command, in the order in which help shows them."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def generate_options(values: dict[str, Any]) -> GenerateOptions:
    """Return the runtime's options from a command's values: this module's and the runtime's own names."""
    from v4graph_runtime import GenerateOptions

    plain = {name: value for name, value in values.items() if name not in ("json_schema", "regex")}
    return GenerateOptions(**plain, constraint=constraint(values["json_schema"], values["regex"]))


def constraint(schema: Path | None, regex: str | None) -> Constraint | None:
    """Return what the text must match, if anything."""
    from v4graph_runtime import Constraint

    if schema is not None and regex is not None:
        raise click.UsageError("--json-schema and --regex exclude each other; leave one out.")
    if schema is not None:
        return Constraint("json_schema", _read(schema))
    return None if regex is None else Constraint("regex", regex)


def _read(path: Path) -> str:
    try:
        text = path.read_text("utf-8")
        json.loads(text)
    except OSError as error:
        raise click.BadParameter(f"{path}: {error.strerror}.", param_hint="--json-schema") from error
    except UnicodeDecodeError as error:
        raise click.BadParameter(f"{path}: not UTF-8 text ({error}).", param_hint="--json-schema") from error
    except (ValueError, RecursionError) as error:
        raise click.BadParameter(
            f"{path}: not JSON ({error}); name a file that holds a JSON schema.", param_hint="--json-schema"
        ) from error
    return text
