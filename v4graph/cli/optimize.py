"""`v4graph optimize` and `v4graph passes`: run graph passes and say what each did."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from v4graph.cli.output import extra, json_option, print_json, progress, size, table
from v4graph.errors import PassError, near_match

if TYPE_CHECKING:
    import onnx_ir as ir

    from v4graph.manifest import Manifest
    from v4graph.passes.measure import Step
    from v4graph.passes.run import Pass, PassReport


@dataclass(frozen=True)
class Choice:
    """Which passes run: names to run and to skip, files of the user's own, and transforms before them."""

    passes: tuple[str, ...]
    skip: tuple[str, ...]
    pass_file: tuple[Path, ...]
    transform: tuple[str, ...]


@click.command()
@click.argument("graph_dir", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--passes", multiple=True, metavar="NAME,...", help="Run only these, in pipeline order.")
@click.option("--skip", multiple=True, metavar="NAME,...", help="Run all but these.")
@click.option(
    "--pass-file", multiple=True, type=click.Path(path_type=Path), help="A Python file with your own passes."
)
@click.option(
    "--transform",
    multiple=True,
    metavar="NAME[=N]",
    help="Change what the graph gives; see `v4graph passes`.",
)
@click.option("--dump-after", metavar="PASS|all", help="Write the graph after a pass to OUT.passes/.")
@click.option("--check", is_flag=True, help="After each pass run the graph before and after, and compare.")
@click.option(
    "--context", default=8192, show_default=True, help="Tokens before the decoded one, in the table."
)
@click.option("--dry-run", is_flag=True, help="Run and report; write nothing.")
@json_option
def optimize(
    graph_dir: Path,
    out: Path,
    dump_after: str | None,
    check: bool,
    context: int,
    dry_run: bool,
    as_json: bool,
    **choice: Any,
) -> None:
    """Run graph passes on a graph directory and write another.

    Shows for each pass what it made of nodes, custom ops, and of the kernel launches and the bytes of a
    decoded token. `v4graph export` has run the default passes already, unless told --no-optimize. --check
    runs one layer of each kind in onnxruntime on random inputs, before and after every pass, and stops at the
    first pass that changes a number, with the node and its inputs, saved in OUT.check/; the exit code is 2
    then.

    \b
    v4graph optimize build/nano.graph build/nano.fast --check
    v4graph optimize build/nano.graph build/nano.mine --pass-file drop_noise.py --check
    v4graph optimize build/nano.graph build/nano.short --transform layers=2
    """
    with extra("export"):
        from v4graph.passes.graph_dir import load_graph
        from v4graph.passes.measure import Step
    chosen = Choice(
        passes=_names(choice["passes"]),
        skip=_names(choice["skip"]),
        pass_file=choice["pass_file"],
        transform=_names(choice["transform"]),
    )
    if not dry_run and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PassError(f"{out}: exists and is not empty; remove it or choose another directory.")
    model, manifest = load_graph(graph_dir)
    step = Step(context=context, capacity=max(manifest.max_seq_len, -(-(context + 1) // 128) * 128))
    transformed, manifest = _transform(model, manifest, chosen.transform, check)
    passes = _passes(chosen)
    dumps = _Dumps(out.parent / f"{out.name}.passes", dump_after, [_name(one) for one in passes], model)
    failed = out.parent / f"{out.name}.check" if check else None
    reports, checked = _run(model, passes, step, dumps, failed)
    if not dry_run:
        from v4graph.passes.graph_dir import follow, save_graph

        save_graph(model, follow(manifest, model, [*transformed, *(r.name for r in reports)]), graph_dir, out)
    if as_json:
        rows = [{**dataclasses.asdict(r), "check": checked.get(r.name)} for r in reports]
        print_json({"graph": None if dry_run else str(out), "transforms": transformed, "passes": rows})
        return
    for line in _table(reports, checked, transformed):
        click.echo(line)
    click.echo("nothing written" if dry_run else f"{out}: written")


def _name(one: Pass) -> str:
    from v4graph.passes.run import name_of

    return name_of(one)


def _names(values: Sequence[str]) -> tuple[str, ...]:
    return tuple(name.strip() for value in values for name in value.split(",") if name.strip())


def _passes(chosen: Choice) -> tuple[Pass, ...]:
    """Return what runs: the default pipeline and the user's passes, or what --passes names of all."""
    from v4graph.passes import pipeline
    from v4graph.passes.run import select
    from v4graph.passes.user_passes import load_passes

    own = tuple(one for path in chosen.pass_file for one in load_passes(path))
    everything = (*pipeline.DEFAULT, *pipeline.OPTIONAL, *own)
    if chosen.passes:
        return select(everything, chosen.passes, chosen.skip)
    return select((*pipeline.DEFAULT, *own), (), chosen.skip)


def _transform(
    model: ir.Model, manifest: Manifest, wanted: Sequence[str], check: bool
) -> tuple[list[str], Manifest]:
    """Apply transforms in place, check them if asked; return what ran and the manifest that follows."""
    from v4graph.config import ModelConfig
    from v4graph.passes.pipeline import TRANSFORMS
    from v4graph.passes.run import apply
    from v4graph.verify import transform_check
    from v4graph.verify.pass_check import copy

    ran = []
    for text in wanted:
        name, _, value = text.partition("=")
        if name not in TRANSFORMS:
            known = ", ".join(TRANSFORMS)
            raise PassError(f"--transform {text}: there are {known}{near_match(name, TRANSFORMS)}.")
        transform = TRANSFORMS[name]
        if transform.takes_number != value.isdigit() or value == "0":
            usage = f"{name}=N with N at least 1" if transform.takes_number else name
            raise PassError(f"--transform {text}: expected {usage}.")
        before = copy(model)
        apply(transform.make(int(value or 0)), model)
        if name == "layers":
            config = ModelConfig.from_dict(manifest.config, source="the graph's config").shrink(
                layers=int(value)
            )
            manifest = dataclasses.replace(manifest, config=dict(config.raw), config_sha256=config.sha256)
            found = transform_check.check_layers(before, model) if check else ""
        else:
            logits = dataclasses.replace(manifest.outputs[0], shape=("B", manifest.outputs[0].shape[-1]))
            manifest = dataclasses.replace(manifest, all_logits=False, outputs=(logits,))
            found = transform_check.check_last_logits(before, model) if check else ""
        ran.append(f"{text}: {found}" if found else text)
    return ran, manifest


class _Dumps:
    """Writes the graph after one pass, or after every pass."""

    def __init__(self, folder: Path, wanted: str | None, names: list[str], model: ir.Model) -> None:
        if wanted not in (None, "all", *names):
            raise PassError(f"--dump-after {wanted}: no such pass runs{near_match(wanted or '', names)}.")
        self._folder, self._wanted, self._model, self._count = folder, wanted, model, 0

    def after(self, report: PassReport) -> None:
        import onnx_ir as ir

        self._count += 1
        if self._wanted not in (report.name, "all"):
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{self._count:02}-{report.name}.onnx"
        partial = path.with_suffix(".partial")
        partial.write_bytes(ir.to_proto(self._model).SerializeToString(deterministic=True))
        partial.replace(path)


def _run(
    model: ir.Model, passes: Sequence[Pass], step: Step, dumps: _Dumps, failed: Path | None
) -> tuple[list[PassReport], dict[str, str]]:
    """Run the passes; with a folder for what fails, each is checked."""
    from v4graph.passes.run import run_passes

    checker = None
    if failed is not None:
        with extra("ort"):
            from v4graph.verify.pass_check import PassChecker
        checker = PassChecker(model, failed)
    with progress() as report:

        def watch(one: Pass, number: int) -> None:
            report(_name(one), number, len(passes))
            if checker:
                checker.watch(one, number)

        def done(found: PassReport) -> None:
            dumps.after(found)
            if checker:
                checker.done(found)

        reports = run_passes(model, passes, step, watch, done)
    return reports, checker.checked if checker else {}


def _table(
    reports: Sequence[PassReport], checked: dict[str, str], transformed: Sequence[str]
) -> Iterator[str]:
    yield from (f"transform {text}" for text in transformed)
    rows: list[list[str | int]] = [
        ["pass", "nodes", "custom ops", "launches", "bytes/token", *["check"][: len(checked)]]
    ]
    for report in reports:
        after = report.after
        launches = "?" if after.launches is None else after.launches
        figures: list[str | int] = [after.nodes, after.custom, launches, size(after.bytes)]
        if not report.modified:
            figures = ["-", "-", "-", "-"]
        rows.append([report.name, *figures, *([checked[report.name]] if checked else [])])
    if reports:
        first = reports[0].before
        rows.insert(
            1, ["before", first.nodes, first.custom, "?" if first.launches is None else first.launches]
        )
        rows[1] += [size(first.bytes), *([""] if checked else [])]
    yield from table(rows)


@click.command()
@json_option
def passes(as_json: bool) -> None:
    """List the graph passes: what runs by default, what on request, and the transforms.

    Passes keep the numbers; transforms change what the graph gives. Your own go in with --pass-file.

    \b
    v4graph passes --json
    v4graph optimize build/nano.graph build/nano.mine --pass-file mine.py
    """
    with extra("export"):
        from v4graph.passes import pipeline
        from v4graph.passes.run import name_of, summary_of
    groups = {"default": pipeline.DEFAULT, "optional": pipeline.OPTIONAL}
    listed = {
        group: [{"name": name_of(one), "summary": summary_of(one)} for one in found]
        for group, found in groups.items()
    }
    listed["transforms"] = [
        {"name": f"{name}=N" if transform.takes_number else name, "summary": transform.summary}
        for name, transform in pipeline.TRANSFORMS.items()
    ]
    if as_json:
        print_json(listed)
        return
    titles = {"default": "run by `v4graph export`, in this order", "optional": "on request, with --passes"}
    titles["transforms"] = "transforms, with --transform: they change what the graph gives"
    width = max(len(entry["name"]) for entries in listed.values() for entry in entries)
    for group, entries in listed.items():
        click.echo(f"{titles[group]}:")
        for entry in entries:
            click.echo(f"  {entry['name'].ljust(width)}  {entry['summary']}")
