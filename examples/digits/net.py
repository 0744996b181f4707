"""A small convolutional net for 8 x 8 images: 29,162 parameters, batch norm after both convolutions."""

from __future__ import annotations

import torch
from torch import nn


def conv_net(seed: int, classes: int = 10) -> nn.Sequential:
    """[n, 1, 8, 8] -> [n, classes]; the same `seed` gives the same weights, and the global random state stays."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, classes),
        )
