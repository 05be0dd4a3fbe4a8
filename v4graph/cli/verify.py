"""`v4graph verify`: do two implementations of a model agree, and if not, which op is wrong."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from v4graph.cli.export import DTYPES
from v4graph.cli.output import extra, json_option, print_json, progress, table
from v4graph.errors import V4GraphError

if TYPE_CHECKING:
    from v4graph.verify.compare import Agreement, Limits
    from v4graph.verify.random_inputs import Array
    from v4graph.verify.sides import Side

SCHEDULES = ("prefill", "decode", "ragged")


@dataclass(frozen=True)
class Text:
    """What both sides are fed: a text, a file of ids, or random tokens."""

    prompt: str | None
    ids: Path | None
    tokens: int
    batch: int
    seed: int


@click.command()
@click.argument("a", required=False)
@click.argument("b", required=False)
@click.option("--checkpoint", help="Weights of a graph or engine, if the other side is no checkpoint.")
@click.option(
    "--numerics",
    type=click.Choice(["exact", "v4"]),
    help="Of a checkpoint in torch; default: the other side's.",
)
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="fp32", show_default=True, help="Likewise.")
@click.option("--prompt", help="Text to feed, by the checkpoint's tokenizer.")
@click.option(
    "--ids", type=click.Path(path_type=Path), help="JSON file of token ids: a list, or a list per slot."
)
@click.option(
    "--tokens", type=click.IntRange(min=1), default=96, show_default=True, help="Random tokens to feed."
)
@click.option(
    "--batch", type=click.IntRange(min=1), default=2, show_default=True, help="Slots of random tokens."
)
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--schedule",
    "schedules",
    multiple=True,
    type=click.Choice(SCHEDULES),
    help="How to cut it; default: prefill, ragged.",
)
@click.option(
    "--atol", default=1e-4, show_default=True, help="Largest difference of logits, both sides exact."
)
@click.option("--kl", default=5e-3, show_default=True, help="Largest mean KL in nats, otherwise.")
@click.option(
    "--argmax",
    default=0.95,
    show_default=True,
    help="Least share of equal argmax where the best two logits are 0.05 apart, otherwise.",
)
@click.option(
    "--schedules",
    "runs",
    type=click.IntRange(min=1),
    is_flag=False,
    flag_value=20,
    metavar="[RUNS]",
    help="Of A alone: random schedules must give the logits of one prefill.",
)
@click.option("--repro", type=click.Path(path_type=Path), help="Run a reproducer again.")
@click.option(
    "--save-repro",
    type=click.Path(path_type=Path),
    default=Path("v4graph-repro.npz"),
    show_default=True,
    help="Where a wrong op is saved.",
)
@click.option("--per-position", is_flag=True, help="Add every position to the output.")
@json_option
def verify(
    a: str | None,
    b: str | None,
    repro: Path | None,
    runs: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Compare two implementations of a model, token by token.

    A and B are any two of: a checkpoint directory (run in torch), a graph directory (run in onnxruntime), an
    engine directory, transformers:DIR. Exact numerics agree within --atol; quantised ones by KL and argmax,
    because one ulp flips an FP8 code. If they disagree, every op of the graph is computed again by its torch
    reference from the same inputs; the first one that is off is named and saved, to be run again with
    --repro. Exit code: 0 they agree, 1 they do not, 2 they cannot be compared.

    \b
    v4graph verify models/nano build/nano.graph
    v4graph verify transformers:hf-model build/exact.engine --schedule decode
    v4graph verify build/nano.engine --schedules --checkpoint models/nano
    v4graph verify --repro v4graph-repro.npz
    """
    with extra("export"):
        import v4graph.verify.bisect  # noqa: F401 - says which package is missing
    if repro is not None:
        report = _replay(repro)
    elif a is None or (b is None and runs is None):
        raise click.UsageError("give two sides A and B, or one side with --schedules, or --repro FILE.")
    elif runs is not None:
        report = _invariant(a, runs, options)
    else:
        assert b is not None
        report = _compare(a, b, options)
    if as_json:
        print_json(report)
    else:
        for line in _lines(report):
            click.echo(line)
    sys.exit(0 if report["agree"] else 1)


def _compare(a: str, b: str, options: dict[str, Any]) -> dict[str, Any]:
    from v4graph.verify import compare, schedules, sides

    first, second = _sides(a, b, options)
    ids = _ids(first, second, _text(options))
    limits = compare.Limits(
        first.numerics == second.numerics == "exact", options["atol"], options["kl"], options["argmax"]
    )
    names = options["schedules"] or ("prefill", "ragged")
    rows, wrong = [], None
    with progress() as report:
        for i, name in enumerate(names):
            calls = schedules.schedule(name, ids.shape[0], ids.shape[1], options["seed"])
            report(f"{name}: {first.kind}", 2 * i, 2 * len(names))
            # Before the first side computes for long.
            sides.check_fits(second, ids.shape[1])
            one = sides.logits(first, ids, calls)
            report(f"{name}: {second.kind}", 2 * i + 1, 2 * len(names))
            found = compare.compare(one, sides.logits(second, ids, calls))
            rows.append(_row(name, found, limits, options["per_position"]))
            if not found.holds(limits):
                wrong = calls
                break
        located = None if wrong is None else _locate((first, second), ids, wrong, options["save_repro"])
    return {
        "a": first.label,
        "b": second.label,
        "numerics": [first.numerics, second.numerics],
        "limits": dataclasses.asdict(limits),
        "schedules": rows,
        "agree": wrong is None,
        "culprit": located,
    }


def _sides(a: str, b: str, options: dict[str, Any]) -> tuple[Side, Side]:
    """Open both; a checkpoint in torch takes the numerics of the other side unless told."""
    from v4graph.source import open_checkpoint
    from v4graph.verify import sides

    weights = None if options["checkpoint"] is None else open_checkpoint(options["checkpoint"])
    dtype = DTYPES[options["dtype"]]
    plain = [sides.open_side(text, weights, options["numerics"], dtype) for text in (a, b)]
    if options["numerics"] is None:
        for i, side in enumerate(plain):
            other = plain[1 - i]
            if side.kind == "checkpoint" and other.kind != "checkpoint":
                plain[i] = dataclasses.replace(side, numerics=other.numerics)
    first, second = (
        sides.with_weights(side, other) for side, other in ((plain[0], plain[1]), (plain[1], plain[0]))
    )
    if first.vocabulary != second.vocabulary:
        raise V4GraphError(
            f"{b}: has {second.vocabulary} token ids, {a} has {first.vocabulary}; compare the same model."
        )
    return first, second


def _text(options: dict[str, Any]) -> Text:
    return Text(**{field.name: options[field.name] for field in dataclasses.fields(Text)})


def _ids(first: Side, second: Side, text: Text) -> Array:
    import numpy as np

    if text.prompt is not None:
        with extra("ort"):
            from v4graph_runtime import Tokenizer
        folders = [side.weights.path if side.weights else side.folder for side in (first, second)]
        return np.array([Tokenizer.load(*folders).encode(text.prompt)], np.int64)
    if text.ids is not None:
        try:
            found = np.array(json.loads(text.ids.read_text()), np.int64)
        except (OSError, ValueError, TypeError) as error:
            raise V4GraphError(
                f"--ids {text.ids}: not a JSON list of token ids, one list per slot ({error})."
            ) from error
        found = found[None] if found.ndim == 1 else found
        if found.ndim != 2 or not found.size or found.min() < 0 or found.max() >= first.vocabulary:
            raise V4GraphError(
                f"--ids {text.ids}: expected lists of one length of ids from 0 to {first.vocabulary - 1}."
            )
        return found
    return np.random.default_rng(text.seed).integers(0, first.vocabulary, (text.batch, text.tokens))


def _row(name: str, found: Agreement, limits: Limits, per_position: bool) -> dict[str, Any]:
    row = {"schedule": name, "agree": found.holds(limits), **dataclasses.asdict(found)}
    if not per_position:
        del row["per_position"]
    return row


def _locate(pair: Sequence[Side], ids: Array, calls: Any, path: Path) -> dict[str, Any] | None:
    """Bisect the graphs and engines of a disagreement; save the first wrong op."""
    from v4graph.verify.bisect import find_culprit
    from v4graph.verify.repro import reproduce

    for side in pair:
        if side.manifest is None or not (side.folder / "model.onnx").is_file():
            continue
        found = find_culprit(side, ids, calls)
        if found is not None:
            saved = reproduce(found)
            saved.save(path)
            return {
                "side": side.label,
                "layer": found.layer,
                "kind": found.kind,
                "node": found.node,
                "op": found.spec.name,
                "port": found.port,
                "call": found.call,
                "sentence": found.sentence,
                "repro": str(path),
                "repro_bytes": path.stat().st_size,
            }
    return None


def _invariant(a: str, runs: int, options: dict[str, Any]) -> dict[str, Any]:
    """Random schedules of one side against its own prefill."""
    import numpy as np

    from v4graph.source import open_checkpoint
    from v4graph.verify import compare, schedules, sides

    weights = None if options["checkpoint"] is None else open_checkpoint(options["checkpoint"])
    side = sides.open_side(a, weights, options["numerics"], DTYPES[options["dtype"]])
    if side.kind == "transformers":
        raise V4GraphError(
            "--schedules: transformers has one schedule only; give a checkpoint, graph or engine."
        )
    ids = _ids(side, side, _text(options))
    limits = compare.Limits(side.numerics == "exact", options["atol"], options["kl"], options["argmax"])
    slack = side.manifest.rollback_slack if side.manifest else 8
    generator = np.random.default_rng(options["seed"])
    rows = []
    with progress() as report:
        report("prefill", 0, runs)
        whole = sides.logits(side, ids, schedules.schedule("prefill", ids.shape[0], ids.shape[1]))
        for run in range(runs):
            report("random schedules", run, runs)
            calls = schedules.ragged(ids.shape[0], ids.shape[1], generator, slack)
            found = compare.compare(whole, sides.logits(side, ids, calls))
            row = _row(f"random {run}", found, limits, options["per_position"])
            rows.append({**row, "calls": [dataclasses.asdict(call) for call in calls]})
            if not found.holds(limits):
                break
    worst = max(rows, key=lambda row: row["max_difference"])
    failing = next((row for row in rows if not row["agree"]), None)
    return {
        "a": side.label,
        "b": "the same, one prefill",
        "limits": dataclasses.asdict(limits),
        "schedules": [{**worst, "schedule": f"worst of {len(rows)}", "calls": None}],
        "agree": failing is None,
        "failing": failing,
        "culprit": None,
    }


def _replay(path: Path) -> dict[str, Any]:
    from v4graph.verify.repro import Repro

    saved = Repro.load(path)
    problem = saved.problem()
    sentence = f"{saved.place}: {problem or 'agrees with its reference'}"
    return {"repro": str(path), "op": saved.spec.name, "agree": not problem, "sentence": sentence}


def _lines(report: dict[str, Any]) -> Iterator[str]:
    if "schedules" not in report:
        yield report["sentence"]
        return
    yield f"A: {report['a']}"
    yield f"B: {report['b']}"
    header = ["schedule", "positions", "max difference", "mean", "mean KL", "same argmax", "where decided"]
    rows: list[list[str | int]] = [list(header)]
    for row in report["schedules"]:
        figures = [f"{row['max_difference']:.2e}", f"{row['mean_difference']:.2e}", f"{row['mean_kl']:.2e}"]
        shares = [f"{row['argmax']:.1%}", f"{row['argmax_decided']:.1%}"]
        rows.append([row["schedule"], row["positions"], *figures, *shares])
    yield from table(rows)
    for row in report["schedules"]:
        for one in row.get("per_position", ()):
            yield (
                f"  slot {one['slot']} token {one['token']}: max difference {one['max_difference']:.2e}, "
                f"KL {one['kl']:.2e}{'' if one['same_argmax'] else ', another argmax'}"
            )
    yield from _verdict(report)


def _verdict(report: dict[str, Any]) -> Iterator[str]:
    limits = report["limits"]
    held = f"max difference {limits['atol']:g}"
    if not limits["exact"]:
        held = f"mean KL {limits['kl']:g}, argmax {limits['argmax']:.0%} where decided"
    if report["agree"]:
        yield f"they agree ({held})"
        return
    yield f"they disagree ({held})"
    if report.get("failing"):
        calls = [(one["counts"], one["back"]) for one in report["failing"]["calls"]]
        yield f"first failing schedule, (new tokens, taken back) per slot: {json.dumps(calls)}"
    elif report["culprit"]:
        yield report["culprit"]["sentence"]
        size = report["culprit"]["repro_bytes"]
        saved = report["culprit"]["repro"]
        yield f"saved in {saved} ({size:,} bytes); run it with `v4graph verify --repro FILE`"
    elif len(set(kinds := report["numerics"])) > 1:
        yield (
            f"one side is {kinds[0]}, the other {kinds[1]}, and every op agrees with "
            "its torch reference: what is left is the quantisation; judge it on text that the model knows "
            "(--prompt)"
        )
    else:
        yield (
            "every op of the graph agrees with its torch reference on its own inputs: the sides have other "
            "weights or another configuration, or the references are wrong"
        )
