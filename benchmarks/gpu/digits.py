"""The handwritten digits as images for large networks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from examples.digits.data import Split, load


def upscaled(split: Split, images: Tensor, side: int, device: torch.device) -> Tensor:
    """Images [n, 1, 8, 8] as [n, 3, side, side], with mean 0 and standard deviation 1 over the training images."""
    mean, deviation = split.images.mean(), split.images.std()
    large = interpolate((images - mean) / deviation, size=(side, side), mode="bilinear")
    return large.expand(-1, 3, -1, -1).contiguous().to(device)


def noisy(seed: int) -> Split:
    """A fifth of the training labels are wrong."""
    return load(seed=seed, noise=0.2)
