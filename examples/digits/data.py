"""scikit-learn's handwritten digits, split once: a training pool of 500 images and 1,297 test images."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

CLASSES = 10
POOL = 500
FOLDS = 5


class Split(NamedTuple):
    """Images are float32 [n, 1, 8, 8] with values 0 to 1, labels int64 [n]."""

    images: Tensor
    labels: Tensor  # what is trained on: some are wrong
    true_labels: Tensor
    test_images: Tensor
    test_labels: Tensor  # all correct


@lru_cache(maxsize=1)
def _pool_and_test() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # One stratified split for every seed: an image used in choosing hyperparameters can never be a test image.
    x, y = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(x, y, train_size=POOL, stratify=y, random_state=0)
    images, test_images = (torch.tensor(a, dtype=torch.float32).view(-1, 1, 8, 8) / 16 for a in (x, x_test))
    return images, torch.tensor(y), test_images, torch.tensor(y_test)


def with_wrong_labels(labels: Tensor, fraction: float, random: torch.Generator) -> Tensor:
    """`labels` with exactly round(fraction * n) of them replaced by another class, uniformly."""
    chosen = torch.randperm(len(labels), generator=random)[: round(fraction * len(labels))]
    shift = torch.randint(1, CLASSES, (len(chosen),), generator=random)
    wrong = labels.clone()
    wrong[chosen] = (labels[chosen] + shift) % CLASSES
    return wrong


def load(seed: int, noise: float = 0.2, validation: bool = False) -> Split:
    """The data of one run; `seed` decides which labels are wrong.

    With `validation` the test images are not there at all: the run trains on four fifths of the training pool, with
    wrong labels, and is judged on the remaining 100 images, with their true labels. Seeds take the five folds in turn.
    """
    images, labels, test_images, test_labels = _pool_and_test()
    random = torch.Generator().manual_seed(seed)
    if validation:
        held_out = torch.arange(POOL) % FOLDS == seed % FOLDS  # the pool is in random order
        images, labels, test_images, test_labels = (
            images[~held_out],
            labels[~held_out],
            images[held_out],
            labels[held_out],
        )
    return Split(images, with_wrong_labels(labels, noise, random), labels, test_images, test_labels)
