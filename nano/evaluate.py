"""Held-out chapters -> bits per byte, and a sample of generated text."""

import math

import torch
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import DeepseekV4ForCausalLM

from nano.text import Chapter


@torch.no_grad()
def bits_per_byte(model: DeepseekV4ForCausalLM, tokenizer: Tokenizer, chapters: list[Chapter]) -> float:
    """Score `<bos> chapter` whole, one chapter at a time, in fp32 with eager attention.

    The nats of every token but <bos>, over ln 2 and the UTF-8 bytes of the text.
    """
    model.eval()
    nats = 0.0
    for chapter in chapters:
        ids = torch.tensor([[0, *tokenizer.encode(chapter.text).ids]])
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        nats += functional.cross_entropy(logits.float(), ids[0, 1:], reduction="sum").item()
    return nats / math.log(2) / sum(len(chapter.text.encode()) for chapter in chapters)


@torch.no_grad()
def sample(model: DeepseekV4ForCausalLM, tokenizer: Tokenizer, prompt: str, tokens: int = 200) -> str:
    """Generate after `<bos> prompt` at temperature 0.8, top-p 0.95, seed 0; <eos> does not stop it."""
    model.eval()
    torch.manual_seed(0)
    ids = torch.tensor([[0, *tokenizer.encode(prompt).ids]])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=True, temperature=0.8,
        top_p=0.95, top_k=0, eos_token_id=None, pad_token_id=1,
    )  # fmt: skip
    return tokenizer.decode(out[0].tolist())
