"""`v4graph inspect`: what a graph, an engine, a checkpoint or a config holds."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from v4graph.cli.output import allow_unknown_option, json_option, print_json, size, table

if TYPE_CHECKING:
    from v4graph.manifest import Binding, Manifest
    from v4graph.source import Source

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1, "int32": 4, "int64": 8}


@click.command()
@click.argument("path", metavar="PATH")
@click.option(
    "--launches",
    is_flag=True,
    help="Kernel launches, bytes and FLOPs of one decoded token, by kind of layer.",
)
@click.option("--context", default=8192, show_default=True, help="Tokens before it, for --launches.")
@allow_unknown_option
@json_option
def inspect(path: str, launches: bool, context: int, allow_unknown: bool, as_json: bool) -> None:
    """Show what a directory or a config holds.

    PATH is a graph or engine directory, or anything that `export` takes.
    Of a graph or engine: layers by kind, custom ops, inputs, state bytes per slot at full capacity,
    weight bytes. Of a checkpoint (whose tensors are checked) or a config: tensors by type and by part.

    \b
    v4graph inspect build/nano.engine
    v4graph inspect flash
    v4graph inspect build/flash.graph --launches --context 131072
    """
    from v4graph.manifest import FILE_NAME, Manifest

    if launches:
        from v4graph.cli.launches import show_launches

        show_launches(Path(path), context, as_json)
        return
    if (Path(path) / FILE_NAME).is_file():
        report = describe_directory(Path(path), Manifest.load(Path(path)))
    else:
        from v4graph.source import resolve

        report = describe_source(resolve(path, allow_unknown=allow_unknown))
    if as_json:
        print_json(report)
        return
    for line in _lines(report):
        click.echo(line)


def describe_directory(directory: Path, manifest: Manifest) -> dict[str, Any]:
    """Return the figures of a graph or engine directory."""
    states: list[dict[str, Any]] = [
        {
            "name": state.name,
            "layers": len(state.layers),
            "ratio": state.ratio,
            "dtype": state.dtype,
            "rows": (rows := state.rows(manifest.max_seq_len)),
            "width": int(state.shape[-1]),
            "bytes": len(state.layers) * rows * int(state.shape[-1]) * ITEM_BYTES[state.dtype],
        }
        for state in manifest.states
    ]
    flags = {"all_logits": manifest.all_logits, "embedded_weights": manifest.embedded_weights}
    return {
        "path": str(directory),
        "kind": manifest.kind,
        "backend": manifest.backend,
        "numerics": manifest.numerics,
        "dtype": manifest.dtype,
        "max_seq_len": manifest.max_seq_len,
        "rollback_slack": manifest.rollback_slack,
        **flags,
        "layers": {name: len(layers) for name, layers in manifest.layer_functions.items()},
        "ops": _op_counts(directory / "model.onnx", manifest),
        "passes": list(manifest.passes),
        "tensorrt": dataclasses.asdict(manifest.tensorrt) if manifest.tensorrt else None,
        "inputs": [{"name": i.name, "dtype": i.dtype, "shape": list(i.shape)} for i in manifest.inputs],
        "states": states,
        "state_bytes": sum(state["bytes"] for state in states),
        "weights": _weights(manifest.bindings),
        "unbound": [{"pattern": u.pattern, "tensors": u.tensors, "bytes": u.bytes} for u in manifest.unbound],
        "files": {path.name: path.stat().st_size for path in sorted(directory.iterdir()) if path.is_file()},
        "notes": list(manifest.notes),
        "tools": manifest.tools,
    }


def _op_counts(path: Path, manifest: Manifest) -> dict[str, int] | dict[str, None]:
    """Count the custom ops of one run; no counts where the onnx package is not installed.

    A plan is not opened: its manifest has the counts.
    """
    if manifest.tensorrt is not None:
        return {plugin.op: plugin.layers for plugin in manifest.tensorrt.plugins}
    try:
        import onnx
    except ModuleNotFoundError:
        return dict.fromkeys(manifest.ops)
    model = onnx.load(path, load_external_data=False)
    functions = {function.name: function for function in model.functions}
    callers = {name for name in functions if _plain(name) not in manifest.ops}
    counts: Counter[str] = Counter()
    for call in model.graph.node:
        # Custom ops have functions too, their bodies; what calls them are the layers and the head.
        body = functions[call.op_type].node if call.op_type in callers else [call]
        counts.update(name for node in body if (name := _plain(node.op_type)) in manifest.ops)
    return dict(sorted(counts.items()))


def _plain(op_type: str) -> str:
    """Return an op's name without its variant: one op specialised several ways is `V4Compress__csa` etc."""
    return op_type.partition("__")[0]


def _weights(bindings: Iterable[Binding]) -> dict[str, dict[str, int]]:
    """Return inputs, checkpoint tensors and bytes by the layout that turns one into the other."""
    rows: dict[str, dict[str, int]] = {}
    for binding in bindings:
        row = rows.setdefault(" + ".join(binding.layout), {"inputs": 0, "tensors": 0, "bytes": 0})
        count = len(binding.layers) or 1
        row["inputs"] += count
        row["tensors"] += count * (binding.experts or 1) * (2 if binding.scale else 1)
        row["bytes"] += count * math.prod(binding.shape) * ITEM_BYTES[binding.dtype]
    return rows


def describe_source(source: Source) -> dict[str, Any]:
    """Return the figures of a checkpoint or of a config alone."""
    from v4graph.inventory import inventory, part_of

    config, checkpoint = source.config, source.checkpoint
    if checkpoint is not None:
        checkpoint.check()
    by_type: dict[str, dict[str, int]] = {}
    by_part: dict[str, dict[str, int]] = {}
    for tensor in inventory(config, checkpoint.weights if checkpoint else None):
        part = part_of(tensor.name)
        for rows, key in ((by_type, tensor.dtype), (by_part, part)):
            row = rows.setdefault(key, {"tensors": 0, "bytes": 0})
            row["tensors"] += 1
            row["bytes"] += tensor.nbytes
    return {
        "path": source.name,
        "kind": "checkpoint" if checkpoint else "config",
        "layers": dict(Counter(layer.kind for layer in config.layers)),
        "mtp_layers": len(config.mtp_layers),
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "n_routed_experts": config.n_routed_experts,
        "tensors": sum(row["tensors"] for row in by_type.values()),
        "bytes": sum(row["bytes"] for row in by_type.values()),
        "by_type": by_type,
        "by_part": by_part,
    }


def _lines(report: dict[str, Any]) -> Iterator[str]:
    kinds = ", ".join(f"{n} {name.removeprefix('V4Layer_')}" for name, n in report["layers"].items())
    yield f"{report['path']}: {report['kind']}, {sum(report['layers'].values())} layers ({kinds})"
    yield from _source_lines(report) if "by_type" in report else _directory_lines(report)


def _source_lines(report: dict[str, Any]) -> Iterator[str]:
    yield (
        f"hidden {report['hidden_size']}, vocabulary {report['vocab_size']}, "
        f"{report['n_routed_experts']} experts, {report['mtp_layers']} MTP layers"
    )
    yield f"{report['tensors']:,} tensors, {report['bytes']:,} bytes"
    for title in ("by_type", "by_part"):
        yield ""
        yield title.replace("_", " ") + ":"
        yield from table(
            [(k, r["tensors"], "tensors", r["bytes"], "bytes") for k, r in report[title].items()], 2
        )


def _directory_lines(report: dict[str, Any]) -> Iterator[str]:
    flags = [flag.replace("_", " ") for flag in ("all_logits", "embedded_weights") if report[flag]]
    backend = [f"backend {report['backend']}"] if report["backend"] else []
    numerics = f"{report['numerics']} numerics in {report['dtype']}"
    yield ", ".join([*backend, numerics, f"{report['max_seq_len']} tokens", *flags])
    yield from (f"note: {note}" for note in report["notes"])
    yield from _tensorrt_lines(report["tensorrt"]) if report["tensorrt"] else ()
    yield from ("", "custom ops:")
    yield from table([(name, "-" if n is None else n) for name, n in report["ops"].items()], 2)
    yield from ("", "inputs:")
    yield from table([(i["name"], i["dtype"], _shape(i["shape"])) for i in report["inputs"]], 2)
    yield from ("", f"state: {size(report['state_bytes'])} per slot at {report['max_seq_len']} tokens")
    rows = [
        (
            s["name"],
            f"ratio {s['ratio']}",
            s["layers"],
            "layers",
            s["dtype"],
            f"{s['rows']} x {s['width']}",
            s["bytes"],
            "bytes",
        )
        for s in report["states"]
    ]
    yield from table(rows, 2)
    yield from ("", f"weights: {size(sum(row['bytes'] for row in report['weights'].values()))} by layout")
    layouts = report["weights"].items()
    yield from table(
        [(k, r["inputs"], "inputs", r["tensors"], "tensors", r["bytes"], "bytes") for k, r in layouts], 2
    )
    for u in report["unbound"]:
        yield f"  not bound yet: {u['pattern']}, {u['tensors']:,} tensors, {u['bytes']:,} bytes"
    yield from ("", "files:")
    yield from table([(name, count, "bytes") for name, count in report["files"].items()], 2)


def _tensorrt_lines(build: dict[str, Any]) -> Iterator[str]:
    streaming = ", weight streaming" if build["weight_streaming"] else ""
    yield (
        f"plan: {build['package']} {build['version']} (CUDA {build['cuda'] or 'unknown'}) for "
        f"{', '.join(build['targets'])}, {build['layers']:,} network layers, "
        f"optimization level {build['optimization_level']}{streaming}"
    )
    if build["bodies"]:
        yield f"without plugin, as native layers: {', '.join(build['bodies'])}"
    yield from ("", "profiles:")
    bounds = ("batch", "tokens", "capacity")
    rows = [(p["name"], *(f"{k} {p[k][0]}..{p[k][2]}" for k in bounds)) for p in build["profiles"]]
    yield from table(rows, 2)


def _shape(shape: list[int | str]) -> str:
    return f"[{', '.join(str(dim) for dim in shape)}]"
