"""Trained checkpoint folder -> the small files beside the released weights: configs, text, README.

`python -m nano.card RUN RELEASE` writes all of models/nano but the weights, which `v4graph pack` makes.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import click

from nano.model import write_official_config

CARD = """# nano

A DeepSeek-V4 small enough for a test: {parameters:,} parameters, 4 layers of every attention kind
(window only, 128:1 compressed, 4:1 compressed with an indexer, 128:1 compressed), 12 experts a layer of
which 2 are used, hash routing in the first layer, hyper-connections of 4 streams. It continues text in
the manner of its one book and knows nothing else; it is no chat model.

| | |
|---|---|
| Text | King James Version of the Bible, from Debian's package bible-kjv-text 4.38, printed with `bible` |
| Licence of the text | public domain (the package's copyright file: the copyright has expired) |
| Licence of the weights | MIT, as this repository |
| Stored bytes (FP8, FP4 experts, bf16, fp32) | {stored_bytes:,} |
| Vocabulary | {vocab:,} byte-level BPE tokens, trained on the training chapters; `<bos>` 0, `<eos>` 1 |
| Training tokens | {training_tokens:,} in the book, {tokens_seen:,} seen ({epochs:.1f} times the book) |
| Steps | {steps} of 4,096 tokens, sequences of 512 and (one batch in four) 2,048 tokens |
| Time | {minutes:.0f} minutes on two shared CPU cores, bf16 autocast |
| Optimisers | Muon (matrices, {muon_lr:g}), AdamW (the rest, {adamw_lr:g}), linear decay to 0, seed {seed} |
| Held-out bits per byte | {bpb:.3f} in fp32 before quantisation, {fp4:.3f} with the experts rounded to FP4 |

- A chapter was seen as `<bos>`, a heading line, one verse a line, `<eos>`. The text is plain ASCII.
- The indexer gets no gradient through top-k. It learns from a loss of its own: the KL divergence from the
  attention's mean distribution over all visible compressed entries to the softmax of its scores.
- The routers' correction bias moves by {balance_rate:g} a step against the load; no auxiliary loss is used.
- The last quarter of the steps runs with the routed experts rounded to FP4 (straight-through gradients).
- Positions beyond 2,048 were never trained.

## Held out

`heldout.txt` holds every 37th chapter, none of which was trained on, with an empty line between two chapters:
{heldout}.

Bits per byte: each chapter alone as `<bos>` + text (with its final newline), the nats of all tokens but
`<bos>`, over ln 2 and the bytes of the chapters.

## Sample

200 tokens after `Genesis 1 / In the beginning`, temperature 0.8, top-p 0.95, from the fp32 weights:

```
{sample}
```

Make it again with `make nano`.
"""


def write_card(run: Path, release: Path) -> None:
    """Write the files of `release` from those of `run` (training.json, tokenizer, heldout.txt)."""
    facts: dict[str, Any] = json.loads((run / "training.json").read_text("utf-8"))
    vocab = json.loads((run / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    write_official_config(release)
    for name in ("tokenizer.json", "tokenizer_config.json", "heldout.txt"):
        shutil.copyfile(run / name, release / name)
    card = CARD.format(
        **facts,
        vocab=len(vocab),
        epochs=facts["tokens_seen"] / facts["training_tokens"],
        minutes=facts["seconds"] / 60,
        bpb=facts["heldout_bits_per_byte"],
        fp4=facts["heldout_bits_per_byte_fp4_experts"],
        heldout=", ".join(facts["heldout_chapters"]),
    )
    (release / "README.md").write_text(card, "utf-8")


@click.command()
@click.argument("run", type=click.Path(path_type=Path, exists=True))
@click.argument("release", type=click.Path(path_type=Path))
def main(run: Path, release: Path) -> None:
    """Write RELEASE's configs, tokenizer, held-out text and README from the training result RUN."""
    write_card(run, release)


if __name__ == "__main__":
    main()
