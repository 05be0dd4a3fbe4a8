"""v4graph's CPU engines against transformers and llama.cpp: the same weights, rounds in turn, one table.

Every side runs in a process of its own and times itself (peers_side.py); models, sides and claims are in
peers_models.py.
"""

from __future__ import annotations

import csv
import dataclasses
import datetime
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click
import llama_side
import numpy as np
from peers_models import MODELS, Claim, Contest, Report
from peers_side import STEPS, Logits, Round, SideProcess, SideSpec, Work

from v4graph.cli.output import json_option, print_json, progress, table
from v4graph.errors import EngineError, V4GraphError
from v4graph_runtime import cpu_kernels
from v4graph_runtime.bench import Load, Timed, median

TOLERANCE = 1e-4  # of logits between exact implementations
QUIET = 0.15  # cores used elsewhere; a round beyond it is run again
ATTEMPTS = 3
OURS = "v4graph"
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Result:
    """What was found for one model: medians and CPU use elsewhere by side, differences of logits by side."""

    contest: Contest
    timed: dict[str, Timed]
    elsewhere: dict[str, float | None]
    differences: dict[str, float]


class Refused(click.ClickException):
    """The comparison cannot be run; another exit code than that of a claim that does not hold."""

    exit_code = 2


def _count(name: str, default: int, text: str, least: int = 1) -> Callable[[F], F]:
    return click.option(name, type=click.IntRange(min=least), default=default, show_default=True, help=text)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--model", "models", type=click.Choice(list(MODELS)), multiple=True, help="Only this one.")
@_count("--rounds", 7, "Rounds that count, after one that does not.")
@_count("--threads", 2, "Threads of every side.")
@_count("--prompt", 512, "Tokens of the prefill.")
@_count("--context", 512, "Tokens in the state before decoding.")
@_count("--tokens", 64, "Tokens decoded per round.", least=STEPS)
@click.option(
    "--work-dir",
    type=click.Path(path_type=Path),
    default=Path("build/peers"),
    show_default=True,
    help="Checkpoints, engines and GGUF files; what is there is not made again.",
)
@click.option("--csv", "csv_file", type=click.Path(path_type=Path), help="Append the rows to this file.")
@json_option
def main(
    models: tuple[str, ...],
    threads: int,
    work_dir: Path,
    csv_file: Path | None,
    as_json: bool,
    **load: int,
) -> None:
    """Time v4graph's CPU engines beside transformers and llama.cpp, and say which claims hold.

    v4-65m is a V4 of 66.6M parameters in every number format; flash-4-layers has 4 layers of V4-Flash's
    size. The first run makes their files (7 GB, 2 minutes). benchmarks/README.md says how to install
    llama.cpp; without it, its sides are left out. Exit code: 0 every claim holds, 1 one does not or
    other processes disturbed it, 2 it cannot be run.

    \b
    python benchmarks/peers.py --csv benchmarks/peers.csv
    python benchmarks/peers.py --model v4-65m --rounds 1 --json
    """
    wanted = Load(**load)
    absent = llama_side.missing()
    if absent:
        click.echo(absent, err=True)
    results = []
    for name in models or MODELS:
        with progress() as report:
            results.append(_result(name, work_dir, wanted, threads, report))
        if not as_json:
            _show(results[-1], wanted, threads)
    if csv_file:
        for result in results:
            _append(csv_file, result, wanted, threads)
    if as_json:
        shared = {**dataclasses.asdict(wanted), "threads": threads, "without_llama_cpp": absent}
        print_json({**shared, "models": [_figures(result) for result in results]})
    if not all(_passes(result) for result in results):
        raise SystemExit(1)


def _result(name: str, work_dir: Path, load: Load, threads: int, report: Report) -> Result:
    try:
        if cpu_kernels.library_path() is None:
            raise EngineError("the CPU kernels are not compiled; run `v4graph kernels build-cpu` first.")
        capacity = max(load.prompt, load.context + load.tokens)
        contest = MODELS[name](work_dir, capacity, not llama_side.missing(), report)
        return _compare(contest, Work(load, contest.config.vocab_size, threads), report)
    except V4GraphError as error:
        raise Refused(str(error)) from error


def _compare(contest: Contest, work: Work, report: Report) -> Result:
    rounds: dict[str, list[Round]] = {side.name: [] for side in contest.sides}
    with ExitStack() as stack:
        processes = []
        for side in contest.sides:
            report(f"open {side.name}", 0, 1)
            processes.append(stack.enter_context(SideProcess(side, work)))
        differences = _differences(contest, work, processes[0].logits(), report)
        # One more round than counts: the first warms caches and pages.
        for turn in range(work.load.rounds + 1):
            for process in processes:
                report(process.spec.name, turn, work.load.rounds + 1)
                rounds[process.spec.name].append(_quiet_round(process) if turn else process.round())
    counted = {name: found[1:] for name, found in rounds.items()}
    return Result(
        contest,
        {name: median([one.timed for one in found]) for name, found in counted.items()},
        {name: _elsewhere(found) for name, found in counted.items()},
        differences,
    )


def _quiet_round(process: SideProcess) -> Round:
    """Run a round again while other processes disturb it; after some attempts take it as it is."""
    found = process.round()
    for _ in range(ATTEMPTS - 1):
        if _quiet(found.elsewhere):
            break
        found = process.round()
    return found


def _quiet(elsewhere: float | None) -> bool:
    return elsewhere is None or elsewhere <= QUIET


def _differences(contest: Contest, work: Work, ours: Logits, report: Report) -> dict[str, float]:
    found = {}
    for side in contest.same_logits:
        report(f"compare {side.name}", 0, 1)
        with SideProcess(side, work) as process:
            found[side.name] = float(np.abs(process.logits() - ours).max())
    return found


def _elsewhere(rounds: Sequence[Round]) -> float | None:
    known = [one.elsewhere for one in rounds if one.elsewhere is not None]
    return statistics.median(known) if known else None


def _ratio(result: Result, claim: Claim) -> tuple[float, str] | None:
    """Return how many times as fast as the fastest peer, and that peer; None where one was left out."""
    if not {claim.ours, *claim.peers} <= result.timed.keys():
        return None
    times = {name: float(getattr(result.timed[name], claim.figure)) for name in (claim.ours, *claim.peers)}
    peer = min(claim.peers, key=lambda name: times[name])
    return times[peer] / times[claim.ours], peer


def _holds(result: Result, claim: Claim) -> bool | None:
    """Whether a claim holds; None where a peer was left out or other processes disturbed a side."""
    found = _ratio(result, claim)
    if found is None or not all(_quiet(result.elsewhere[name]) for name in (claim.ours, *claim.peers)):
        return None
    return found[0] >= claim.required


def _passes(result: Result) -> bool:
    """Whether every claim that could be looked into holds, and exact sides agree."""
    checked = [claim for claim in result.contest.claims if _ratio(result, claim)]
    holds = all(_holds(result, claim) for claim in checked)
    return holds and all(value <= TOLERANCE for value in result.differences.values())


def _show(result: Result, load: Load, threads: int) -> None:
    contest = result.contest
    ours = [side for side in contest.sides if side.kind == OURS]
    click.echo(f"{contest.name}: {contest.parameters / 1e6:.1f}M parameters, {threads} threads")
    heads = [f"{side.name} is faster by" for side in ours]
    rows = [("", "prefill", "tokens/s", "per token", "tokens/s", "elsewhere", *heads)]
    for side in contest.sides:
        one, busy = result.timed[side.name], result.elsewhere[side.name]
        rows.append(
            (
                side.name,
                f"{one.prefill * 1e3:.1f} ms",
                f"{load.prompt / one.prefill:.0f}",
                f"{one.decode * 1e3:.2f} ms",
                f"{1 / one.decode:.1f}",
                "" if busy is None else f"{busy:.2f}",
                *(_faster(result, one, side, mine) for mine in ours),
            )
        )
    for line in table(rows):
        click.echo(line)
    click.echo(
        f"prefill of {load.prompt} tokens, decode after {load.context}, medians of {load.rounds} rounds in "
        "turn; elsewhere: cores that other processes used meanwhile"
    )
    if not all(_quiet(busy) for busy in result.elsewhere.values()):
        click.echo("Other processes disturbed this run: repeat it on a quiet machine.")
    click.echo()
    for line in _verdicts(result, load):
        click.echo(line)
    click.echo()


def _faster(result: Result, one: Timed, side: SideSpec, mine: SideSpec) -> str:
    if side.kind == OURS:
        return ""
    base = result.timed[mine.name]
    return f"{one.prefill / base.prefill:.2f} x, {one.decode / base.decode:.2f} x"


def _verdicts(result: Result, load: Load) -> list[str]:
    lines = []
    for name, value in result.differences.items():
        verdict = "pass" if value <= TOLERANCE else "FAIL"
        lines.append(
            f"{verdict}  logits of {result.contest.sides[0].name} and {name} differ by at most {value:.1e} "
            f"(limit {TOLERANCE:.0e}), after {load.prompt} tokens and {STEPS} more"
        )
    for claim in result.contest.claims:
        found, what = _ratio(result, claim), f"{claim.figure} of {claim.ours}"
        if found is None:
            lines.append(f"left out  {what} against {', '.join(claim.peers)}")
            continue
        ratio, peer = found
        verdict = {True: "pass", False: "FAIL", None: "disturbed"}[_holds(result, claim)]
        hoped = "reached" if ratio >= claim.stretch else "not reached"
        stretch = f"; {claim.stretch:g} x {hoped}" if claim.stretch > claim.required else ""
        lines.append(f"{verdict}  {what}: {ratio:.2f} x {peer} (at least {claim.required:g} x{stretch})")
    return lines


def _figures(result: Result) -> dict[str, Any]:
    claims: list[dict[str, Any]] = []
    for claim in result.contest.claims:
        claims.append({**dataclasses.asdict(claim), "ratio": None})
        if found := _ratio(result, claim):
            ratio, peer = found
            claims[-1] |= {"ratio": ratio, "fastest_peer": peer, "holds": _holds(result, claim)}
    return {
        "model": result.contest.name,
        "parameters": result.contest.parameters,
        "sides": [
            {
                "side": name,
                "prefill_seconds": one.prefill,
                "decode_seconds": one.decode,
                "cores_used_elsewhere": result.elsewhere[name],
            }
            for name, one in result.timed.items()
        ],
        "logit_differences": result.differences,
        "claims": claims,
    }


def _append(path: Path, result: Result, load: Load, threads: int) -> None:
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    shared = [load.prompt, load.context, load.tokens, load.rounds, threads]
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if fresh:
            columns = ["date", "model", "side", "prompt", "context", "tokens", "rounds", "threads"]
            writer.writerow([*columns, "prefill_s", "decode_s", "cores_elsewhere"])
        for name, one in result.timed.items():
            busy = result.elsewhere[name]
            figures = [f"{one.prefill:.6f}", f"{one.decode:.6f}", "" if busy is None else f"{busy:.3f}"]
            writer.writerow([today, result.contest.name, name, *shared, *figures])


if __name__ == "__main__":
    main()
