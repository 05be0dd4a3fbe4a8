"""Expert weights -> FP4 (e2m1, one power-of-two scale per 32), as the checkpoint will store them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

BLOCK = 32
LARGEST = 6.0
GRID = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def round_fp4(weight: Tensor) -> Tensor:
    """Return `weight` [..., K] on the FP4 grid; 32 neighbours along K share a scale 2^ceil(log2(max/6))."""
    blocks = weight.unflatten(-1, (-1, BLOCK))
    largest = blocks.abs().amax(-1, keepdim=True).clamp(min=LARGEST * 2.0**-126)
    scale = torch.exp2(torch.ceil(torch.log2(largest / LARGEST)))
    middles = (GRID[1:] + GRID[:-1]) / 2
    index = torch.bucketize((blocks / scale).abs(), middles)
    return (GRID[index] * blocks.sign() * scale).flatten(-2)


@contextmanager
def rounded(parameters: list[Tensor]) -> Iterator[None]:
    """Let the parameters hold FP4 values inside the block, and their own ones again after it.

    Gradients computed inside are those at the rounded weights: the straight-through estimate.
    """
    kept = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(round_fp4(parameter))
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, own in zip(parameters, kept, strict=True):
                parameter.copy_(own)
