"""A character GPT on the source text of Python's own standard library."""

from __future__ import annotations

import sysconfig
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from studies.defaults.networks.network import Data, Network, small_weights
from studies.probe_transformer import Block

CHARACTERS = 1_000_000
CONTEXT = 32
ALPHABET = 128  # ASCII
TRAIN, VALIDATION = 0.9, 0.05  # the rest is the test text
EVERY = 3  # of the windows of validation and test text, every third is judged, which saves time


@lru_cache(maxsize=1)
def text() -> Tensor:
    """The first million ASCII characters of the library's modules in the order of their names, int64 from 0 to 127."""
    found, size = [], 0
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        found.append(bytes(byte for byte in file.read_bytes() if byte < ALPHABET))
        size += len(found[-1])
        if size >= CHARACTERS:
            break
    return torch.frombuffer(bytearray(b"".join(found)[:CHARACTERS]), dtype=torch.uint8).long()


def windows(characters: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and targets, [n, CONTEXT] each: the target of a character is the next one."""
    n = (len(characters) - 1) // CONTEXT
    return characters[: n * CONTEXT].view(n, CONTEXT), characters[1 : n * CONTEXT + 1].view(n, CONTEXT)


def data(seed: int, validation: bool) -> Data:
    """Split by position, the same for every seed."""
    characters = text()
    first, second = int(TRAIN * len(characters)), int((TRAIN + VALIDATION) * len(characters))
    judged = windows(characters[first:second] if validation else characters[second:])
    return Data(*windows(characters[:first]), *(part[::EVERY] for part in judged))


class CharacterGPT(nn.Module):
    """[n, context] characters -> [n, context, ALPHABET] logits of the next ones; small weights."""

    def __init__(self, seed: int, width: int = 128, depth: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(ALPHABET, width)
        self.position = nn.Parameter(torch.zeros(CONTEXT, width))
        self.blocks = nn.Sequential(*(Block(width, heads, causal=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, ALPHABET)
        small_weights(self, seed)

    def forward(self, characters: Tensor) -> Tensor:
        tokens = self.embed(characters) + self.position[: characters.shape[1]]
        return self.head(self.norm(self.blocks(tokens)))


def gpt(seed: int) -> nn.Module:
    """About 0.6 M parameters; the global random state stays."""
    with torch.random.fork_rng(devices=[]):
        return CharacterGPT(seed)


GPT = Network(
    "gpt",
    "Python source text, character GPT, AdamW",
    metric="loss",
    load=data,
    model=gpt,
    base=torch.optim.AdamW,
    base_options={"lr": 1e-3, "weight_decay": 0.1},
    batch_size=16,
    steps=200,
    warmup_steps=20,
    grid="small",
    tuning_seeds=2,
)
