"""Train nano: book -> tokenizer -> weights in transformers' format, the same for the same seed.

`python -m nano.train --out DIR` writes DIR (model, tokenizer, heldout.txt, training.json); `v4graph pack`
then converts it to the official FP8 and FP4 storage and `nano.card` writes what stands beside it.
On a busy machine set OMP_WAIT_POLICY=PASSIVE: threads that wait spinning made a step three times slower here.
"""

import json
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch
from rich.progress import track
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional
from transformers import DeepseekV4ForCausalLM

from nano.attention import NAME, IndexerLoss, use_windowed_attention
from nano.balance import LoadBalance
from nano.batches import batches, encode
from nano.evaluate import bits_per_byte, sample
from nano.fp4 import rounded
from nano.model import OFFICIAL, build_model, stored_bytes
from nano.muon import Muon
from nano.text import Chapter, TextError, fetch_text, read_chapters, split_chapters
from nano.tokenizer import save_tokenizer, train_tokenizer

logger = logging.getLogger("nano")
STEPS = 400


@dataclass(frozen=True)
class Recipe:
    """How to train. All of it is fixed; only smoke tests change the steps."""

    steps: int = STEPS
    seed: int = 0
    micro_batches: int = 2
    muon_lr: float = 5e-3
    adamw_lr: float = 3e-3
    weight_decay: float = 0.1
    warmup: int = 40
    decay_from: float = 0.4
    fp4_from: float = 0.75
    balance_rate: float = 4e-3
    clip: float = 1.0
    checkpoints: int = 4

    def rate(self, step: int) -> float:
        """Return the factor on both learning rates: warm up, hold, fall linearly to zero."""
        fall = (self.steps - step) / ((1 - self.decay_from) * self.steps)
        return min((step + 1) / self.warmup, fall, 1.0)


class Trainer:
    """One model with its optimisers and two side channels, the indexer's loss and the experts' balance."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.model: DeepseekV4ForCausalLM = build_model(recipe.seed)
        self.indexer: IndexerLoss = use_windowed_attention(self.model)
        self.balance = LoadBalance(self.model, recipe.balance_rate)
        matrices, others = split_parameters(self.model)
        self.others = others
        self.experts: list[Tensor] = [p for name, p in self.model.named_parameters() if ".experts." in name]
        decay = recipe.weight_decay
        self.optimisers: list[tuple[torch.optim.Optimizer, float]] = [
            (Muon(matrices, recipe.muon_lr, weight_decay=decay), recipe.muon_lr),
            (torch.optim.AdamW(others, recipe.adamw_lr, (0.9, 0.95), weight_decay=0.01), recipe.adamw_lr),
        ]

    def step(self, step: int, source: Iterator[Tensor]) -> dict[str, float]:
        """Take one optimiser step; return what to log."""
        self.model.train()
        self.model.config._attn_implementation = NAME
        losses = torch.zeros(2)
        store = rounded(self.experts) if step >= self.recipe.fp4_from * self.recipe.steps else nullcontext()
        with store:
            for _ in range(self.recipe.micro_batches):
                losses += self._backward(next(source)) / self.recipe.micro_batches
        norm = torch.nn.utils.clip_grad_norm_(self.others, self.recipe.clip)
        for optimiser, lr in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = lr * self.recipe.rate(step)
            optimiser.step()
            optimiser.zero_grad()
        worst = self.balance.step()
        return {"loss": losses[0].item(), "indexer": losses[1].item(), "norm": norm.item(), "load": worst}

    def _backward(self, ids: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        indexer = self.indexer.take()
        ((loss + indexer) / self.recipe.micro_batches).backward()
        return torch.stack([loss, indexer]).detach()


def split_parameters(model: DeepseekV4ForCausalLM) -> tuple[list[Tensor], list[Tensor]]:
    """Return (matrices for Muon, the rest for AdamW): embedding, head, routers, mHC, vectors."""
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in model.named_parameters():
        hidden = name.endswith(("_proj", "_proj.weight"))
        (matrices if hidden else others).append(parameter)
    return matrices, others


def save(model: DeepseekV4ForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write a checkpoint folder that appears under its name only when complete."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.config._attn_implementation = "eager"
    model.save_pretrained(partial)
    save_tokenizer(tokenizer, partial, OFFICIAL["max_position_embeddings"])
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def run(recipe: Recipe, chapters: tuple[list[Chapter], list[Chapter]], work_dir: Path, out: Path) -> None:
    """Train, with a checkpoint and a held-out score now and then, and write the result to `out`."""
    training, held_out = chapters
    tokenizer = train_tokenizer((chapter.text for chapter in training), OFFICIAL["vocab_size"])
    stream = encode(tokenizer, training)
    source, trainer = batches(stream, recipe.seed), Trainer(recipe)
    begin, seen = time.monotonic(), 0
    logger.info("%d training tokens, %d stored bytes", len(stream.ids), stored_bytes(trainer.model))
    for step in track(range(recipe.steps), "training", update_period=5):
        measured = trainer.step(step, source)
        seen += 2048 * recipe.micro_batches
        if step % 10 == 0:
            told = " ".join(f"{key} {value:.3f}" for key, value in measured.items())
            logger.info("step %d %s, %.0f s", step, told, time.monotonic() - begin)
        if (step + 1) % max(1, recipe.steps // recipe.checkpoints) == 0 and step + 1 < recipe.steps:
            save(trainer.model, tokenizer, work_dir / f"step-{step + 1:05d}")
            logger.info("held-out bits per byte %.4f", bits_per_byte(trainer.model, tokenizer, held_out))
    save(trainer.model, tokenizer, out)
    seconds = time.monotonic() - begin
    facts = {"tokens_seen": seen, "training_tokens": len(stream.ids), "seconds": round(seconds)}
    report(trainer, tokenizer, held_out, facts, out)


def report(
    trainer: Trainer, tokenizer: Tokenizer, held_out: list[Chapter], facts: dict[str, float], out: Path
) -> None:
    """Score the trained model; write heldout.txt, and training.json with the recipe, `facts` and scores."""
    model = trainer.model
    with rounded(trainer.experts):
        fp4 = bits_per_byte(model, tokenizer, held_out)
    result = {
        **asdict(trainer.recipe),
        **facts,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "stored_bytes": stored_bytes(model),
        "heldout_bits_per_byte": bits_per_byte(model, tokenizer, held_out),
        "heldout_bits_per_byte_fp4_experts": fp4,
        "heldout_chapters": [chapter.title for chapter in held_out],
        "sample": sample(model, tokenizer, "Genesis 1\nIn the beginning"),
    }
    (out / "training.json").write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    (out / "heldout.txt").write_text("\n".join(chapter.text for chapter in held_out), "ascii")
    logger.info("%s", result)


@click.command()
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder of the trained checkpoint."
)
@click.option("--work-dir", type=click.Path(path_type=Path), default=Path("build/nano"), show_default=True,
              help="Packages, text and intermediate checkpoints.")  # fmt: skip
@click.option("--data", type=click.Path(path_type=Path, exists=True), help="Verses already extracted.")
@click.option("--steps", default=STEPS, show_default=True, help="Fewer make a smoke test.")
@click.option("--seed", default=0, show_default=True)
def main(out: Path, work_dir: Path, data: Path | None, steps: int, seed: int) -> None:
    """Train the nano model on the King James text of Debian's bible-kjv-text."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(2)
    try:
        verses = data.read_text("ascii") if data else fetch_text(work_dir)
        chapters = split_chapters(read_chapters(verses))
    except TextError as error:
        raise click.ClickException(str(error)) from error
    run(Recipe(steps=steps, seed=seed), chapters, work_dir, out)


if __name__ == "__main__":
    main()
