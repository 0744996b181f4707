"""What a client is: a network, its batches, its loss, and the base optimizer that people train it with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Batch = Any  # a tensor, or a tuple of tensors that are equally long


@dataclass(frozen=True)
class Client:
    """One column of the table.

    Attributes:
        model: the network; weights are drawn from torch's global generator.
        batches: an endless iterator for a seed.
        loss: `loss(model, batch)`, the mean over the batch.
        held_out: what the final loss is computed on, as one batch.
    """

    label: str
    model: Callable[[], nn.Module]
    batches: Callable[[int], Iterator[Batch]]
    loss: Callable[[nn.Module, Batch], Tensor]
    held_out: Callable[[], Batch]
    base: type[torch.optim.Optimizer]
    base_options: dict[str, Any]
    steps: int


def shuffled(data: tuple[Tensor, ...], size: int, seed: int) -> Iterator[tuple[Tensor, ...]]:
    """Batches of `size` in a new order every epoch, without end; what is left over of an epoch is dropped."""
    random = torch.Generator().manual_seed(seed)
    while True:
        for index in torch.randperm(len(data[0]), generator=random).split(size):
            if len(index) == size:
                yield tuple(part[index] for part in data)
