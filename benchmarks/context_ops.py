"""The ops that read caches, one at a time on a session's own caches, for context_cost.py; and a MatMul."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from op_sessions import open_graph

from v4graph.config import ModelConfig
from v4graph.ops import DOMAIN, OPS_BY_NAME
from v4graph.ops.spec import evaluate_dim
from v4graph_export.functions import OPSETS

RATIOS = (4, 128)  # of a CSA layer and of an HCA layer
ONNX = {"float32": ir.DataType.FLOAT, "int32": ir.DataType.INT32}
Call = Callable[[], None]


def op_feeds(name: str, config: ModelConfig, cache: np.ndarray, context: int) -> dict[str, np.ndarray]:
    """Return the inputs of one op for the token that ends at `context`; `cache` is a session's own."""
    heads, width = config.num_attention_heads, config.head_dim
    sizes = {"B": 1, "S": 1, "H": heads, "Dh": width, "F": config.qk_rope_head_dim // 2, "N": cache.shape[1]}
    sizes |= {"Q": config.index_n_heads * config.index_head_dim, "Hi": config.index_n_heads}
    sizes |= {"C": config.index_head_dim, "L": config.sliding_window + 8, "K": config.index_topk}
    random = np.random.default_rng(1)
    chosen = random.permutation(context // RATIOS[0])[: config.index_topk].astype(np.int32)
    known = {
        "start": np.array([context - 1], np.int32),
        "num": np.ones(1, np.int32),
        "rows": np.pad(chosen, (0, config.index_topk - len(chosen)), constant_values=-1).reshape(1, 1, -1),
        "freqs": (1e4 ** -(np.arange(sizes["F"]) / sizes["F"])).astype(np.float32),
    }
    feeds = {}
    for port in OPS_BY_NAME[name].inputs:
        shape = [evaluate_dim(dim, sizes) for dim in port.dims]
        made = cache if port.dims[1:2] == ("N",) else random.standard_normal(shape, np.float32)
        feeds[port.name] = known.get(port.name, made)
    return feeds


def lone_op(name: str, config: ModelConfig, cache: np.ndarray, threads: int) -> Callable[[int], Call]:
    """Return what makes a call of one op at a context, on a session's own cache."""
    known: dict[str, int | float] = {
        "window": config.sliding_window,
        "topk": config.index_topk,
        "quantise": 1,
    }
    known["ratio"] = RATIOS[name == "V4CompressedAttention"]
    indexing = config.index_head_dim**-0.5 * config.index_n_heads**-0.5
    known["scale"] = indexing if name == "V4IndexTopK" else config.head_dim**-0.5
    spec = OPS_BY_NAME[name]
    attributes = {key: known[key] for key in spec.attributes}
    session = op_session(name, op_feeds(name, config, cache, 1024), attributes, threads)

    def at(context: int) -> Call:
        feeds = op_feeds(name, config, cache, context)
        binding = session.io_binding()
        for key, array in feeds.items():
            binding.bind_ortvalue_input(key, onnxruntime.OrtValue.ortvalue_from_numpy(array))
        for port in spec.outputs:
            binding.bind_output(f"out_{port.name}")

        # `held`: a binding does not keep numpy's memory.
        def call(held: Mapping[str, np.ndarray] = feeds) -> None:
            session.run_with_iobinding(binding)

        return call

    return at


def op_session(
    name: str, feeds: Mapping[str, np.ndarray], attributes: Mapping[str, Any], threads: int
) -> Any:
    """Return an onnxruntime session of one op on the CPU kernels."""
    spec = OPS_BY_NAME[name]
    values = [
        ir.Value(name=key, type=ir.TensorType(ONNX[str(array.dtype)]), shape=ir.Shape(array.shape))
        for key, array in feeds.items()
    ]
    items = [ir.convenience.convert_attribute(key, value) for key, value in attributes.items()]
    node = ir.Node(DOMAIN, name, values, items, num_outputs=len(spec.outputs))
    for value, port in zip(node.outputs, spec.outputs, strict=True):
        dtype = "int32" if port.dtypes == ("int32",) else "float32"
        value.name, value.type = f"out_{port.name}", ir.TensorType(ONNX[dtype])
        value.shape = ir.Shape([None] * len(port.dims))
    graph = ir.Graph(values, node.outputs, nodes=[node], opset_imports=dict(OPSETS), name="op")
    return open_graph(graph, threads)


def multiplication(threads: int) -> Call:
    """Return a call of a float32 matrix product of 2 x 1024^3 operations in onnxruntime."""
    square = np.random.default_rng(2).standard_normal((1024, 1024), dtype=np.float32)
    values = [
        ir.Value(name=n, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(square.shape)) for n in "ab"
    ]
    node = ir.Node("", "MatMul", values, [], num_outputs=1)
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(values, node.outputs, nodes=[node], opset_imports={"": 24}, name="product")
    session = open_graph(graph, threads)

    def call() -> None:
        session.run(None, {"a": square, "b": square})

    return call
