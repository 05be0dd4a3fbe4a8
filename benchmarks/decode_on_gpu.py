"""One decoded token of a whole model on this machine's GPU, without TensorRT, as one CUDA graph.

The lowered graph's custom ops run through their plugins' enqueue; weights are random bytes in the
checkpoint's formats, one tensor for all layers of a shape, so that Flash fits a GPU: what lies between two
uses of a weight is larger than the cache. Prints microseconds per layer kind and of the model, tokens per
second, and the roofline of the same GPU beside it: the bytes of a token at the copy bandwidth measured in the
same run.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from gpu_graph import GpuGraph, Values
from kernel_calls import inputs_of
from kernels import Ceilings, Emulated, Gpu, Prepared
from torch import Tensor

from v4graph.config import Layer, ModelConfig
from v4graph.launch import PLANS
from v4graph.launch.calls import Call, Chunk
from v4graph.launch.cost import COSTS
from v4graph.launch.fused_calls import fused_head_calls, fused_layer_calls
from v4graph.manifest import Binding, Manifest
from v4graph.source import resolve
from v4graph_export import ExportOptions, export_graph
from v4graph_plugins.lowering import lower
from v4graph_runtime.state import state_tensors

ROUNDS, COPIES = 20, 3
Work = Callable[[], None]


def weight(binding: Binding, vocab: int, experts: int) -> torch.Tensor:
    """Return random values that mean something: codes that are numbers, small scales, experts that exist."""
    shape, name = binding.shape, binding.input
    if binding.dtype == "int64":
        return torch.rand((vocab, experts)).topk(shape[-1]).indices
    if binding.dtype == "int8" and name.endswith(".scale"):
        return torch.randint(115, 118, shape, dtype=torch.int8)
    if binding.dtype == "int8":
        codes = torch.randint(0, 256, shape, dtype=torch.uint8)
        return torch.where(codes & 127 == 127, codes - 1, codes).view(torch.int8)
    spread = 1.0 if name.endswith("norm.weight") else 0.02
    return (spread * torch.randn(shape)).to(getattr(torch, binding.dtype))


def model_feeds(config: ModelConfig, manifest: Manifest, context: int) -> Values:
    """Return weights, states after `context` tokens, and one new token."""
    feeds: Values = {}
    for binding in manifest.bindings:
        shared = weight(binding, config.vocab_size, config.n_routed_experts)
        feeds |= {name: shared for name, _ in binding.inputs()}
    for state in state_tensors(manifest, 1):
        feeds[state.name] = torch.randn(state.shape).to(getattr(torch, state.dtype))
    feeds["input_ids"] = torch.randint(0, config.vocab_size, (1, 1))
    feeds["start_pos"] = torch.full((1,), context, dtype=torch.int32)
    feeds["num_tokens"] = torch.ones(1, dtype=torch.int32)
    return feeds


def token_seconds(graph: GpuGraph, feeds: Values, machine: Gpu) -> float:
    """Return the time of a token: on a GPU, of a CUDA graph's replay."""
    if graph.device == "cpu":
        return machine.seconds(lambda: graph.run(feeds))
    replay, outputs = graph.capture(feeds)
    took = machine.seconds(replay, ROUNDS)
    if not bool(torch.isfinite(outputs["logits"]).all()):
        raise click.ClickException("the logits are not finite.")
    return took


def floor_of(calls: list[Call], context: int, top: Ceilings) -> float:
    """Return the seconds below which the calls cannot be: bytes at the copy bandwidth, or FLOPs."""
    total = 0.0
    for call in calls:
        nbytes, flops = COSTS[call.op].of(call, context)
        total += max(nbytes / (top.copy_gb_s * 1e9), flops / (top.bf16_tflop_s * 1e12))
    return total


def layer_kinds(config: ModelConfig) -> dict[str, tuple[Layer, int]]:
    """Return a layer of each kind and how many there are."""
    kinds: dict[str, tuple[Layer, int]] = {}
    for layer in config.layers:
        kinds[layer.kind] = (layer, kinds.get(layer.kind, (layer, 0))[1] + 1)
    return kinds


def layer_copies(config: ModelConfig, layer: Layer, chunk: Chunk, machine: Gpu, context: int) -> list[Work]:
    """Return copies of one layer's calls, each with weights of its own."""
    calls, copies, experts = fused_layer_calls(config, layer, chunk), list[Work](), list[Tensor]()
    for copy in range(COPIES):
        prepared = []
        for call in calls:
            inputs = inputs_of(call, context)
            if call.op.startswith("V4MoE"):
                # Gigabytes: one set, of which every copy takes other experts.
                experts = experts or inputs
                inputs = [*inputs[:3], *experts[3:]]
                inputs[1] = (inputs[1] + 17 * copy) % call.sizes["E"]
            prepared.append(Prepared(call, inputs, machine))
        copies.append(functools.partial(_launch, prepared))
    return copies


def _launch(prepared: list[Prepared]) -> None:
    for one in prepared:
        one.launch()


def measure_layers(
    config: ModelConfig, chunk: Chunk, machine: Gpu, context: int, top: Ceilings
) -> list[dict[str, Any]]:
    """Return a row for each layer kind."""
    rows = []
    for kind, (layer, count) in layer_kinds(config).items():
        calls = fused_layer_calls(config, layer, chunk)
        took = machine.seconds_as_graph(layer_copies(config, layer, chunk, machine, context))
        floor = floor_of(calls, context, top)
        launches = sum(len(call.launches(PLANS).launches) for call in calls)
        row = {"layer": kind, "count": count, "launches": launches, "us": took * 1e6, "floor_us": floor * 1e6}
        click.echo(
            "{layer:12} x {count:2}: {us:7.1f} us, floor {floor_us:6.1f}, {launches} launches".format(**row)
        )
        rows.append(row)
    return rows


def whole_graph(model: str, graph: Path | None, layers: int | None, capacity: int) -> tuple[bytes, Manifest]:
    """Return the lowered graph of the model, exported here where none is given."""
    with tempfile.TemporaryDirectory() as folder:
        if graph is None:
            graph = Path(folder) / "graph"
            source = resolve(model)
            if layers:
                source = dataclasses.replace(source, config=source.config.shrink(layers))
            export_graph(source, graph, ExportOptions(dtype="bfloat16", numerics="v4", max_seq_len=capacity))
        manifest = Manifest.load(graph)
        return lower(graph / "model.onnx", manifest, ("portable",), ()).onnx, manifest


@click.command(help=__doc__)
@click.option("--model", default="flash", show_default=True)
@click.option("--context", default=4096, show_default=True, help="Tokens in the state.")
@click.option("--graph", type=click.Path(path_type=Path), help="A bf16 graph of the model, exported before.")
@click.option("--layers", type=int, help="Shrink the model to this many layers.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="JSON file to write.")
@click.option("--emulate", is_flag=True, help="Try this script on the emulator, without a GPU.")
def main(model: str, context: int, graph: Path | None, layers: int | None, out: Path, emulate: bool) -> None:
    """Measure and write."""
    machine, config = Emulated() if emulate else Gpu(), ModelConfig.load(model).shrink(layers)
    device = "cpu" if emulate else "cuda"
    capacity = -(-(context + 1) // 128) * 128
    with torch.inference_mode(), torch.device(device):
        top = machine.ceilings()
        rows = measure_layers(config, Chunk(1, 1, capacity), machine, context, top)
    torch.set_default_device("cpu")
    lowered, manifest = whole_graph(model, graph, layers, capacity)
    with torch.inference_mode():
        with torch.device(device):
            feeds = model_feeds(config, manifest, context)
        took = token_seconds(GpuGraph(lowered, machine.launcher, device), feeds, machine)
    chunk = Chunk(1, 1, manifest.max_seq_len)
    calls = [call for layer in config.layers for call in fused_layer_calls(config, layer, chunk)]
    floor = floor_of([*calls, *fused_head_calls(config, chunk)], context, top)
    record = {
        "device": machine.name,
        "model": model,
        "context": context,
        "copy_gb_s": top.copy_gb_s,
        "layers": rows,
        "token_us": took * 1e6,
        "floor_us": floor * 1e6,
        "tokens_per_s": 1 / took,
    }
    click.echo(
        f"{model}, {len(config.layers)} layers, after {context} tokens on {machine.name}: "
        f"{took * 1e3:.3f} ms a token, {1 / took:.0f} tokens/s; "
        f"roofline {floor * 1e3:.3f} ms, {1 / floor:.0f} tokens/s"
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1))
    partial.replace(out)


if __name__ == "__main__":
    main()
