"""Chapters -> token stream -> training batches that mostly start where a chapter starts."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from nano.text import Chapter

# Most sequences are four times the attention window; every fourth batch is one long sequence, so that
# compressed entries are read far beyond what the window sees.
SHAPES = ((4, 512), (4, 512), (4, 512), (1, 2048))


@dataclass(frozen=True)
class Stream:
    ids: Tensor
    starts: list[int]


def encode(tokenizer: Tokenizer, chapters: list[Chapter]) -> Stream:
    """Concatenate `<bos> chapter <eos>`; `starts` are the places of <bos>."""
    ids: list[int] = []
    starts: list[int] = []
    for encoding in tokenizer.encode_batch([chapter.text for chapter in chapters]):
        starts.append(len(ids))
        ids += [0, *encoding.ids, 1]
    return Stream(torch.tensor(ids), starts)


def batches(stream: Stream, seed: int) -> Iterator[Tensor]:
    """Yield [B, S + 1] token ids without end, in the order `SHAPES` gives."""
    generator = torch.Generator().manual_seed(seed)
    windows = {S: _windows(stream, S, generator) for _, S in SHAPES}
    while True:
        for B, S in SHAPES:
            yield torch.stack([next(windows[S]) for _ in range(B)])


def _windows(stream: Stream, S: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield windows: each chapter's first S tokens, its later ones at jittered places, in random order."""
    last = len(stream.ids) - S - 1
    ends = [*stream.starts[1:], len(stream.ids)]
    while True:
        places = []
        for start, end in zip(stream.starts, ends, strict=True):
            later = range(start + S, end, S)
            jitter = torch.randint(-S // 2, S // 2, (len(later),), generator=generator).tolist()
            places += [start, *(place + shift for place, shift in zip(later, jitter, strict=True))]
        for index in torch.randperm(len(places), generator=generator).tolist():
            place = min(places[index], last)
            yield stream.ids[place : place + S + 1]
