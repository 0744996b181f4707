"""What the examples share: data, accuracy, the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from examples.digits.data import load


def training_data(limit: int | None = None) -> TensorDataset:
    """The 500 training images (or the first `limit`), with 20 % of the labels wrong."""
    data = load(seed=0)
    return TensorDataset(data.images[:limit], data.labels[:limit])


def loader(batch_size: int, limit: int | None = None) -> DataLoader:
    """Shuffled batches of `training_data`, all of the same size."""
    return DataLoader(training_data(limit), batch_size, shuffle=True, drop_last=True)


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """Between 0 and 1, on the 1,297 test images."""
    data = load(seed=0)
    device = next(model.parameters()).device
    model.eval()
    return float((model(data.test_images.to(device)).argmax(dim=1).cpu() == data.test_labels).float().mean())


def main(train: Callable[..., float]) -> None:
    """`train(epochs=...)` with `--epochs` from the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=10)
    print(f"test accuracy {100 * train(epochs=parser.parse_args().epochs):.1f} %")
