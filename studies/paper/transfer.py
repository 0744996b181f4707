"""Table 3 in small: a network trained on the digits 0 to 4 is fine-tuned on a few images of 5 to 9."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from studies.defaults.networks import Data
from studies.defaults.networks.mnist import all_images
from studies.defaults.training import batches

CLASSES = 5
POOL, FINE_TUNED, VALIDATION = 400, 100, 200  # images of 5 to 9: fine-tuned on some of the pool; the rest is for the test
EPOCHS = 30
PRETRAINING_STEPS, PRETRAINING_LR, BATCH = 300, 1e-3, 64  # with AdamW, whatever fine-tunes

Images = Callable[[], tuple[Tensor, Tensor]]  # all images and their labels, 0 to 9, in one random order for every seed
Build = Callable[[int], nn.Module]


@lru_cache(maxsize=1)
def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 digits, float32 [n, 1, 8, 8] from 0 to 1."""
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return torch.tensor(x, dtype=torch.float32)[order].view(-1, 1, 8, 8) / 16, torch.tensor(y)[order]


DATA: dict[str, Images] = {"digits": digits, "MNIST": all_images}


def fine_tuning(images: Images, seed: int, validation: bool) -> Data:
    """Images of 5 to 9 as classes 0 to 4; `seed` decides which of the pool are trained on."""
    x, y = images()
    x, y = x[y >= CLASSES], y[y >= CLASSES] - CLASSES
    seen = torch.randperm(POOL, generator=torch.Generator().manual_seed(seed))[:FINE_TUNED]
    judged = slice(POOL, POOL + VALIDATION) if validation else slice(POOL + VALIDATION, None)
    return Data(x[seen], y[seen], x[judged], y[judged])


def pooled(build: Build, seed: int) -> nn.Module:
    """A network for 8 x 8 images behind a pooling of 28 x 28 images to that size."""
    return nn.Sequential(nn.ZeroPad2d(2), nn.AvgPool2d(4), build(seed))


def pretrained(images: Images, build: Build, seed: int) -> nn.Module:
    """The network with the weights of the pre-training, the same for every seed, but for a new last layer."""
    model = copy.deepcopy(_trained(images, build))
    last = list(model.modules())[-1]
    assert isinstance(last, nn.Linear)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        last.reset_parameters()
    return model


@lru_cache(maxsize=8)
def _trained(images: Images, build: Build) -> nn.Module:
    x, y = images()
    x, y = x[y < CLASSES], y[y < CLASSES]
    model = build(0)
    optimizer = torch.optim.AdamW(model.parameters(), PRETRAINING_LR)
    for index, _ in zip(batches(len(x), BATCH, seed=0), range(PRETRAINING_STEPS), strict=False):
        optimizer.zero_grad()
        cross_entropy(model(x[index]), y[index]).backward()
        optimizer.step()
    return model
