"""The model of a graph run eagerly in torch, with the same numerics, weights and state contract.

It is what onnxruntime and TensorRT are compared with where transformers has no such numerics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from v4graph.checkpoint import Checkpoint
from v4graph.config import ModelConfig
from v4graph.states import layer_states, round_capacity
from v4graph_export import model
from v4graph_export.bindings import LAYER_PREFIX, head_bindings, layer_bindings, model_bindings
from v4graph_export.flavour import Flavour
from v4graph_export.registration import TORCH_DTYPES


def checkpoint_weights(checkpoint: Checkpoint, flavour: Flavour) -> dict[str, Tensor]:
    """Return every weight input by name, as torch tensors that share the checkpoint's memory."""
    tensors = {}
    for binding in model_bindings(checkpoint.config, flavour):
        for name, layer in binding.inputs():
            tensors[name] = _tensor(checkpoint.bind(binding, layer))
    return tensors


def _tensor(array: np.ndarray) -> Tensor:
    array = array if array.flags.writeable else array.copy()
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


class Reference:
    """A batch of sequences in eager torch; `step` appends tokens and returns logits."""

    def __init__(
        self,
        config: ModelConfig,
        flavour: Flavour,
        weights: Mapping[str, Tensor],
        *,
        batch: int = 1,
        capacity: int = 1024,
        slack: int = 8,
    ) -> None:
        """Allocate zeroed states for `batch` slots of `capacity` tokens."""
        self._config, self._flavour, self._weights = config, flavour, weights
        self.position = torch.zeros(batch, dtype=torch.int32)
        rows = round_capacity(config, capacity)
        self._states: list[dict[str, Tensor]] = []
        for layer in config.layers:
            contracts = layer_states(config, layer, slack, flavour.dtype)
            self._states.append(
                {
                    s.name: torch.zeros(batch, s.rows(rows), _width(s.shape), dtype=TORCH_DTYPES[s.dtype])
                    for s in contracts
                }
            )
        self._layers = [model.DecoderLayer(config, layer, flavour) for layer in config.layers]
        self._freqs = {
            False: torch.from_numpy(config.rope.frequencies()),
            True: torch.from_numpy(config.compress_rope.frequencies()),
        }

    @torch.no_grad()
    def step(self, ids: Tensor, num: Tensor | None = None) -> Tensor:
        """Append `num` int32 [B] of the tokens int64 [B, S] (default all); logits float32 [B, S, V]."""
        if num is None:
            num = torch.full((ids.shape[0],), ids.shape[1], dtype=torch.int32)
        x = model.embed(ids, self._weights["embed.weight"], TORCH_DTYPES[self._flavour.dtype])
        for i, decoder in enumerate(self._layers):
            chunk = model.Chunk(ids, self.position, num, self._freqs[decoder.layer.ratio > 0])
            prefix = LAYER_PREFIX.replace("{i}", str(i))
            names = [b.input for b in layer_bindings(self._config, decoder.layer, self._flavour)]
            weights = {name: self._weights[prefix + name] for name in names}
            x, following = decoder(x, chunk, weights, self._states[i])
            self._states[i] = dict(following)
        self.position = self.position + num
        names = [b.input for b in head_bindings(self._config, self._flavour)]
        weights = {name: self._weights[name] for name in names}
        return model.head(self._config, x, num, weights, all_logits=True)


def _width(shape: Sequence[int | str]) -> int:
    width = shape[2]
    assert isinstance(width, int)
    return width
