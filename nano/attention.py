"""DeepSeek-V4 attention for training: eager's numbers at half the work, and a loss for the indexer.

transformers' eager attention scores every query with every key and masks what the window hides. Here a query
block sees its own and the previous key block only, followed by the compressed entries.

Source: transformers 5.23 models/deepseek_v4; the indexer loss follows the DeepSeek-V3.2 report.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, DeepseekV4ForCausalLM
from transformers.masking_utils import eager_mask

NAME = "nano_windowed"


class IndexerLoss:
    """Teaches the indexer, which gets no gradient through top-k, what the attention wants.

    The loss is the KL divergence from the attention's distribution over all visible compressed entries,
    averaged over heads, to the softmax of the index scores. Neither side's gradient leaves the indexer.
    """

    def __init__(self, model: DeepseekV4ForCausalLM):
        self.losses: list[Tensor] = []
        self.scores: dict[nn.Module, Tensor] = {}
        module: Any
        for module in model.modules():
            indexer = getattr(getattr(module, "compressor", None), "indexer", None)
            if indexer is not None:
                indexer.register_forward_pre_hook(_detach_inputs)
                indexer.scorer.register_forward_hook(self._keep_scores(module))
                module.indexer_loss = self

    def take(self) -> Tensor:
        """Return the sum of the losses since the last call."""
        total = torch.stack(self.losses).sum()
        self.losses.clear()
        return total

    def add(self, attention: nn.Module, logits: Tensor, ratio: int) -> None:
        """Score one layer; `logits` [B, H, S, T] are the attention's, unmasked."""
        S, T = logits.shape[-2:]
        visible = torch.arange(T) < ((torch.arange(S) + 1) // ratio)[:, None]
        target = logits.detach().float().masked_fill(~visible, -1e9).softmax(-1).mean(1)
        scores = self.scores.pop(attention).float().masked_fill(~visible, -1e9)
        kl = functional.kl_div(scores.log_softmax(-1), target, reduction="none").sum(-1)
        self.losses.append(kl[:, ratio - 1 :].mean())

    def _keep_scores(self, attention: nn.Module) -> Any:
        def keep(_module: nn.Module, _inputs: Any, scores: Tensor) -> None:
            if attention.training:
                self.scores[attention] = scores

        return keep


def _detach_inputs(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    hidden, residual, *rest = inputs
    return (hidden.detach(), residual.detach(), *rest)


def windowed_attention(
    module: Any, query: Tensor, key: Tensor, _value: Tensor, attention_mask: Tensor, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attend from `query` [B, H, S, D] to `key` [B, 1, S + T, D]: S tokens, then T compressed entries.

    S is a multiple of the window, and no cache is in use. Returns [B, S, H, D].
    """
    B, H, S, D = query.shape
    W = module.sliding_window
    scaled = query * kwargs["scaling"]
    tokens, entries = key[:, 0, :S], key[:, 0, S:]
    pairs = functional.pad(tokens, (0, 0, W, 0)).unfold(1, 2 * W, W).transpose(2, 3)  # [B, N, 2W, D]
    blocks = scaled.view(B, H, S // W, W, D).transpose(1, 2).reshape(B, S // W, H * W, D)
    near = (blocks @ pairs.transpose(2, 3)).view(B, S // W, H, W, 2 * W)
    near = near.transpose(1, 2) + _window_bias(S, W)
    far = (scaled.reshape(B, H * S, D) @ entries.transpose(1, 2)).view(B, H, S, -1)
    if hasattr(module, "indexer_loss") and module.training:
        module.indexer_loss.add(module, far, module.compressor.compress_rate)
    far = far + attention_mask[..., S:]
    sinks = module.sinks.view(1, H, 1, 1).expand(B, H, S, 1)
    weights = torch.cat([near.reshape(B, H, S, 2 * W), far, sinks], -1).float().softmax(-1).to(key.dtype)
    near, far = weights[..., : 2 * W], weights[..., 2 * W : -1]
    near = near.reshape(B, H, S // W, W, 2 * W).transpose(1, 2).reshape(B, S // W, H * W, 2 * W)
    out = (near @ pairs).view(B, S // W, H, W, D).transpose(1, 2).reshape(B, H, S, D)
    out = out + (far.reshape(B, H * S, -1) @ entries).view(B, H, S, D)
    return out.transpose(1, 2).contiguous(), None


def _window_bias(S: int, W: int) -> Tensor:
    """Return [N, W, 2W]: 0 where block n's query sees the key, -inf elsewhere."""
    distance = torch.arange(W)[:, None] + W - torch.arange(2 * W)
    seen = ((distance >= 0) & (distance < W)).repeat(S // W, 1, 1)
    seen[0, :, :W] = False  # nothing comes before the first block
    return torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))


def use_windowed_attention(model: DeepseekV4ForCausalLM) -> IndexerLoss:
    """Switch `model` to this attention for training; `model.set_attn_implementation("eager")` undoes it."""
    AttentionInterface.register(NAME, windowed_attention)
    AttentionMaskInterface.register(NAME, eager_mask)
    model.config._attn_implementation = NAME
    return IndexerLoss(model)
