"""Load balance of the experts without an auxiliary loss: the routers' correction bias follows the load.

Source: DeepSeek-V3 report, section 2.1.2.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekV4ForCausalLM


class LoadBalance:
    """Counts how often each expert is chosen and moves the biases against it."""

    def __init__(self, model: DeepseekV4ForCausalLM, rate: float):
        self.rate = rate
        self.loads: dict[Any, Tensor] = {}
        for module in model.modules():
            if hasattr(module, "e_score_correction_bias"):
                module.register_forward_hook(self._count)

    @torch.no_grad()
    def step(self) -> float:
        """Move the biases by `rate` each; return the largest load in units of the mean load."""
        worst = 0.0
        for router, load in self.loads.items():
            router.e_score_correction_bias += self.rate * torch.sign(load.mean() - load)
            worst = max(worst, (load.max() / load.mean()).item())
        self.loads.clear()
        return worst

    def _count(self, router: Any, _inputs: Any, outputs: tuple[Tensor, Tensor, Tensor]) -> None:
        if router.training:
            load = torch.bincount(outputs[2].flatten(), minlength=len(router.e_score_correction_bias)).float()
            self.loads[router] = self.loads.get(router, 0) + load
