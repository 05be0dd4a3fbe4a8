"""Rewrites config.json: fewer layers or experts, or the hub form of a transformers config."""

from __future__ import annotations

import copy

from v4graph.config.values import Raw

PER_LAYER = ("layer_types", "mlp_layer_types")


def shrink_raw(raw: Raw, layers: int | None, experts: int | None) -> Raw:
    """Return `raw` with the first `layers` layers, the MTP entries kept, and `experts` experts."""
    raw = copy.deepcopy(raw)
    if layers is not None:
        count = raw["num_hidden_layers"]
        raw["num_hidden_layers"] = layers
        for key in PER_LAYER:
            if raw.get(key) is not None:
                raw[key] = raw[key][:layers]
        if raw.get("compress_ratios") is not None:
            raw["compress_ratios"] = raw["compress_ratios"][:layers] + raw["compress_ratios"][count:]
        if raw.get("num_hash_layers") is not None:
            raw["num_hash_layers"] = min(raw["num_hash_layers"], layers)
    if experts is not None:
        raw["n_routed_experts"] = experts
    return raw
