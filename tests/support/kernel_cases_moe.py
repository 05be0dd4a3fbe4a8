"""Calls of the routing and MoE ops that their kernels are tested on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from kernel_run import Inputs, KernelCase
from op_cases import OpCase


def cases() -> Iterator[KernelCase]:
    """Yield them."""
    yield from _topk()
    yield from _hash()
    yield from _moe()


def _equal_logits(inputs: Inputs) -> None:
    """Few distinct logits, summed exactly, and a bias of three steps: most selections are ties."""
    inputs["u"] = inputs["u"].sign() * (inputs["u"].abs() > 1.5)
    gate = inputs["gate"].sign() * (inputs["gate"].abs() > 1.5)
    gate[1::2] = gate[0]
    inputs["gate"] = gate
    inputs["bias"] = (torch.arange(len(gate)) % 3).float() / 4


def _no_bias(inputs: Inputs) -> None:
    _equal_logits(inputs)
    inputs["u"][:, 0] = 0.0
    inputs["bias"] = torch.zeros_like(inputs["bias"])


def _topk() -> Iterator[KernelCase]:
    shapes = (
        # slots, tokens of each, channels, experts, chosen
        (1, 1, 1040, 12, 2),
        (3, 2, 264, 40, 6),
        (2, 17, 72, 130, 8),
        (1, 80, 136, 200, 6),
        (1, 1100, 24, 5, 5),
    )
    for slots, tokens, width, experts, topk in shapes:
        sizes = {"S": tokens, "D": width, "E": experts}
        case = OpCase("V4RouteTopK", sizes, {"topk": topk, "scale": 2.5}, start=(0,) * slots)
        yield KernelCase(case)
        yield KernelCase(case, "ties", _equal_logits)
    yield KernelCase(OpCase("V4RouteTopK", {"S": 33, "D": 64, "E": 512}, {"topk": 32, "scale": 1.0}))
    yield KernelCase(
        OpCase("V4RouteTopK", {"S": 3, "D": 64, "E": 12}, {"topk": 6, "scale": 1.0}), "all-ties", _no_bias
    )


def _hash() -> Iterator[KernelCase]:
    for slots, tokens, width, experts, chosen in (
        (1, 1, 4104, 12, 6),
        (2, 33, 64, 5, 2),
        (1, 3, 264, 300, 11),
    ):
        sizes = {"S": tokens, "D": width, "E": experts, "V": 61, "K": chosen}
        # Standard deviations of the logits are far above the release's; weights of 1e-9 would say nothing.
        yield KernelCase(OpCase("V4RouteHash", sizes, {"scale": 1.5}, start=(0,) * slots), "", _small(width))


def _small(width: int) -> Callable[[Inputs], None]:
    def change(inputs: Inputs) -> None:
        inputs["gate"] = inputs["gate"] * width**-0.5

    return change


def _one_expert(inputs: Inputs) -> None:
    inputs["ids"][..., 0] = 3
    inputs["ids"][..., 1:] = 1


def _twice(inputs: Inputs) -> None:
    """Tokens that name one expert for all their slots, and, in every third token, another order."""
    ids = inputs["ids"].reshape(-1, inputs["ids"].shape[-1])
    ids[::2] = ids[::2, :1].clone()
    ids[::3] = ids[::3].flip(-1)


def _positive(inputs: Inputs) -> None:
    """Weights of routing as they are, positive with a sum of 1.5."""
    weights = inputs["weights"].abs() + 0.1
    inputs["weights"] = 1.5 * weights / weights.sum(-1, keepdim=True)


def _small_floats(inputs: Inputs) -> None:
    for name in ("w1", "w3", "w2", "s1", "s3", "s2"):
        inputs[name] = inputs[name] * inputs[name].shape[-1] ** -0.5


def _zero_scales(inputs: Inputs) -> None:
    """Blocks of zeros as a converter may write them, first and later ones."""
    inputs["w1_scale"][:, 0, 0] = 0.0
    inputs["s2_scale"][0, -1] = 0.0
    inputs["w2_scale"][0] = 0.0


def _moe() -> Iterator[KernelCase]:
    shapes = (
        # slots, tokens of each, experts, chosen, width, inner width of the shared expert
        (1, 1, 12, 6, 256, 128),
        (1, 1, 5, 9, 128, 256),
        (2, 1, 5, 2, 256, 256),
        (1, 9, 12, 4, 256, 128),
        (3, 11, 12, 2, 256, 256),
        (1, 80, 5, 2, 384, 256),
    )
    for slots, tokens, experts, chosen, width, shared in shapes:
        sizes = {"S": tokens, "D": width, "E": experts, "K": chosen, "I": 128, "Is": shared}
        for case in _forms(sizes, slots):
            small = _small_floats if case.op == "V4MoEFloat" else None
            yield KernelCase(case, "", small)
            if slots * tokens > 2:
                yield KernelCase(case, "one-expert", _all_of(small, _one_expert, _positive))
                yield KernelCase(case, "twice", _all_of(small, _twice, _positive))
            if case.scale == "float32":
                yield KernelCase(case, "zero-scales", _zero_scales)


def _forms(sizes: Mapping[str, int], slots: int) -> Iterator[OpCase]:
    width, inner, start = sizes["D"], sizes["I"], (0,) * slots
    packed = {"D2": width // 2, "DS": width // 32, "I2": inner // 2, "IS": inner // 32}
    blocks = {"IsB": sizes["Is"] // 128, "DB": width // 128}
    yield OpCase("V4MoE", {**sizes, **packed, **blocks}, {"limit": 0.3}, start)
    yield OpCase("V4MoEFp8", {**sizes, **blocks, "IB": 1}, {"limit": 10.0}, start, scale="float32")
    yield OpCase("V4MoEFp8", {**sizes, **blocks, "IB": 1}, {"limit": 0.6}, start)
    yield OpCase("V4MoEFloat", sizes, {"limit": 1.5}, start)


def _all_of(*changes: Callable[[Inputs], None] | None) -> Callable[[Inputs], None]:
    def change(inputs: Inputs) -> None:
        for one in changes:
            if one:
                one(inputs)

    return change
