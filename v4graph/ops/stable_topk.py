"""Top-k with ties to the lowest index: a stable sort in eager torch, TopK in ONNX.

torch.topk keeps another set of tied entries, and a stable sort has no ONNX translation, so the
exporter registers this function as an internal torch operator and lowers it to one ONNX TopK.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from v4graph.ops.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

OPERATOR = "v4graph::stable_topk"
SCHEMA = "(Tensor x, SymInt k) -> (Tensor, Tensor)"


def sort_and_cut(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest values of the last axis and their int64 indices, best first."""
    values, order = torch.sort(x, dim=-1, descending=True, stable=True)
    return values[..., :k].contiguous(), order[..., :k].contiguous()


def stable_topk(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Like `sort_and_cut`; goes through the registered operator where one exists, to be traceable."""
    namespace, name = OPERATOR.split("::")
    operator = getattr(getattr(torch.ops, namespace), name, None)
    if operator is None:
        return sort_and_cut(x, k)
    values, rows = operator(x, k)
    return values, rows
