"""A character model like nanoGPT's smallest, on the source text of Python's standard library."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from studies.probe_transformer import Block

CONTEXT = 64
BATCH = 6
CHARACTERS = 128  # ASCII; all others count as "?"
TRAINING, HELD_OUT = 500_000, 20_000


@lru_cache(maxsize=1)
def text() -> tuple[Tensor, Tensor]:
    """Character codes for training, and those held out, from other files."""
    files = sorted(Path(argparse.__file__).parent.glob("*.py"))
    sources = [file.read_text(encoding="utf-8").encode("ascii", "replace") for file in files]
    first, last = b"".join(sources)[:TRAINING], b"".join(reversed(sources))[:HELD_OUT]
    return torch.tensor(list(first)), torch.tensor(list(last))


def batches(seed: int) -> Iterator[Tensor]:
    """Windows [n, CONTEXT + 1]: each character is to be told from those before it."""
    random = torch.Generator().manual_seed(seed)
    codes = text()[0]
    while True:
        starts = torch.randint(len(codes) - CONTEXT, (BATCH, 1), generator=random)
        yield codes[starts + torch.arange(CONTEXT + 1)]


def held_out() -> Tensor:
    return text()[1].unfold(0, CONTEXT + 1, CONTEXT)


class CharacterModel(nn.Module):
    """[n, t] codes -> [n, t, CHARACTERS]; the head shares its weight with the embedding, as in nanoGPT."""

    def __init__(self, width: int = 64, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(CHARACTERS, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, heads, causal=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CHARACTERS, bias=False)
        self.head.weight = self.embed.weight
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.normal_(self.position.weight, std=0.02)

    def forward(self, codes: Tensor) -> Tensor:
        x = self.embed(codes) + self.position.weight[: codes.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def loss(model: nn.Module, windows: Tensor) -> Tensor:
    return cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
