"""One run: train, then measure accuracy, the largest Hessian eigenvalue and the time of a step."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from examples.digits.data import load
from examples.digits.methods import Method
from examples.digits.net import conv_net
from gam_fused import FusedGAM
from gam_fused.flatness import hessian_eigenvalues


@dataclass(frozen=True)
class Settings:
    """What all runs of a comparison share."""

    epochs: int = 30
    batch_size: int = 64
    noise: float = 0.2
    validation: bool = False  # judge on a fold of the training pool instead of the test images
    curves: bool = True  # accuracies after every epoch, not only after the last


def run(method: Method, seed: int, settings: Settings) -> dict[str, Any]:
    """Trains one net. `seed` decides the wrong labels, the starting weights and the order of batches for all methods.

    Returns:
        JSON-ready numbers: accuracies between 0 and 1 ("test" is the validation fold with `settings.validation`);
        "eigenvalue", the largest Hessian eigenvalue of the training loss on all training images in eval mode (NaN where
        it is not finite); "step_ms", the median time of a training step: all its passes and the update.
    """
    data = load(seed, settings.noise, settings.validation)
    model = conv_net(seed)
    optimizer = method.optimizer(model)
    batches = math.ceil(len(data.images) / settings.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs * batches)
    order = torch.Generator().manual_seed(seed)
    times: list[float] = []
    curves: dict[str, list[float]] = {"loss": [], "train": [], "test": []}
    for epoch in range(settings.epochs):
        model.train()
        losses = []
        for index in torch.randperm(len(data.images), generator=order).split(settings.batch_size):
            x, y = data.images[index], data.labels[index]
            start = time.perf_counter()
            losses.append(train_step(model, optimizer, x, y))
            times.append(time.perf_counter() - start)
            schedule.step()
        curves["loss"].append(float(torch.stack(losses).mean()))
        if settings.curves or epoch == settings.epochs - 1:
            curves["train"].append(_accuracy(model, data.images, data.labels))
            curves["test"].append(_accuracy(model, data.test_images, data.test_labels))
    return {
        **asdict(method),
        "label": method.label,
        "seed": seed,
        "test": curves["test"][-1],
        "train": curves["train"][-1],
        "train_true": _accuracy(model, data.images, data.true_labels),
        "loss": curves["loss"][-1],
        "eigenvalue": _eigenvalue(model, data.images, data.labels),
        "step_ms": 1e3 * statistics.median(times),
        "skipped_steps": int(getattr(optimizer, "skipped_steps", 0)),
        "curves": curves,
    }


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    """One step on a batch, as each optimizer wants it; returns the detached loss at the weights before the step."""
    if isinstance(optimizer, FusedGAM):
        return optimizer.step(lambda batch: cross_entropy(model(batch[0]), batch[1]), (x, y)).detach()
    optimizer.zero_grad()
    loss = cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.detach()


@torch.no_grad()
def _accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    return float((model(images).argmax(dim=1) == labels).float().mean())


def _eigenvalue(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    try:
        return float(hessian_eigenvalues(lambda: cross_entropy(model(images), labels), model.parameters(), tolerance=1e-2))
    except ValueError:  # diverged: the curvature is not finite
        return math.nan
