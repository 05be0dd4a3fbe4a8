"""Sessions of small graphs in onnxruntime, with the CPU kernels of the custom ops."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import onnxruntime

from v4graph_runtime import cpu_kernels


def open_graph(graph: ir.Graph, threads: int) -> Any:
    """Return a session of a graph on the CPU with so many threads."""
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    settings.intra_op_num_threads = threads
    cpu_kernels.register(settings, [], threads)
    model = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    return onnxruntime.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
