"""Batches that are a function of seed and step alone, so that a run which was killed goes on exactly where it was.

The order of images is drawn anew for every epoch, and an image's augmentation too; neither depends on workers, ranks or what
came before. One pass over a loader is the whole training.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

Place = tuple[int, int]  # epoch and index


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def seed_of(*numbers: int) -> int:
    return hash(numbers) & 0xFFFFFFFF  # torch's CPU generator uses as many bits


class Augmented(Dataset):
    """The images of `samples`, transformed, by `Place`; with `labels` in the place of their own."""

    def __init__(self, samples: Any, transform: Any, labels: list[int] | None, seed: int):
        self.samples, self.transform, self.labels, self.seed = samples, transform, labels, seed

    def __getitem__(self, place: Place) -> tuple[Any, int]:
        epoch, index = place
        image, label = self.samples[index]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of(self.seed, epoch, index))
            image = self.transform(image.convert("RGB"))
        return image, label if self.labels is None else self.labels[index]


class Steps(Sampler):
    """This rank's part of every batch, from step `start` to `steps`. Images of an epoch that fill no batch are left out."""

    def __init__(self, images: int, batch_size: int, start: int, steps: int, seed: int):
        self.images, self.batch_size, self.start, self.steps, self.seed = images, batch_size, start, steps, seed

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[Place]]:
        drawn = -1
        for step in range(self.start, self.steps):
            epoch, batch = divmod(step, self.images // self.batch_size)
            if epoch != drawn:
                random = torch.Generator().manual_seed(seed_of(self.seed, epoch))
                order, drawn = torch.randperm(self.images, generator=random).tolist(), epoch
            here = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield [(epoch, index) for index in here[rank() :: ranks()]]


def training_batches(data: Augmented, steps: Steps, workers: int) -> DataLoader:
    return DataLoader(data, batch_sampler=steps, **_options(workers))


def test_batches(samples: Any, transform: Any, batch_size: int, workers: int) -> DataLoader:
    """This rank's part of the test set."""
    own = range(rank(), len(samples), ranks())
    data = Augmented(samples, transform, labels=None, seed=0)
    return DataLoader(Subset(data, [(0, i) for i in own]), batch_size, **_options(workers))


def _options(workers: int) -> dict[str, Any]:
    # A loader takes a number from its generator for every pass; from the global one, that would move dropout on.
    own = {"generator": torch.Generator(), "persistent_workers": workers > 0}
    return {"num_workers": workers, "pin_memory": torch.cuda.is_available(), **own}
