"""DeepSeek-V3.2 at the same context: KV cache bytes and FLOPs, and the published API prices of V4.

Source: DeepSeek-V3.2's cache layout (per token and layer 512 FP8 values, 4 float32 scales and 64 bf16 RoPE
channels; an index key of 128 FP8 values and one float32 scale), its configuration (61 layers, 128 heads, 64
index heads of 128, top-k 2048, 36.6B parameters per token), and the technical report of DeepSeek-V4.
"""

from __future__ import annotations

LAYERS, HEADS, INDEX_HEADS, INDEX_DIM, TOPK = 61, 128, 64, 128, 2048
LATENT, LATENT_ROPE = 512, 64
MULTIPLIED = 36_600_000_000
ROW = LATENT + 4 * 4 + 2 * LATENT_ROPE
INDEX_ROW = INDEX_DIM + 4
BYTES_PER_TOKEN = LAYERS * (ROW + INDEX_ROW)
# Published API prices in USD per million tokens: (input that misses the cache, output).
API_PRICES = {"flash": (0.14, 0.28), "pro": (1.74, 3.48)}


def flops(context: int) -> dict[str, int]:
    """Return the FLOPs of one decoded token with `context` visible tokens, by part."""
    return {
        "linear": 2 * MULTIPLIED,
        "indexer": LAYERS * 2 * INDEX_HEADS * INDEX_DIM * context,
        "attention": LAYERS * 2 * HEADS * (2 * LATENT + LATENT_ROPE) * min(TOPK, context),
    }


def fp8_flops(context: int) -> int:
    """Return them in FP8 equivalents: its attention is bf16 and counts twice, its index keys are FP8."""
    parts = flops(context)
    return parts["linear"] + parts["indexer"] + 2 * parts["attention"]
