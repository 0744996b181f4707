"""What the study knows about a network: its data, its weights, its base optimizer and how long it trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Data(NamedTuple):
    """What is trained on, and what the run is judged on: validation or test data. Samples lie along the first dimension."""

    inputs: Tensor
    targets: Tensor
    judged_inputs: Tensor
    judged_targets: Tensor


@dataclass(frozen=True)
class Network:
    """One network of the study.

    Attributes:
        metric: "accuracy" (higher is better) or "loss" (lower is better), on the data that a run is judged on.
        load: the data of a run from its seed; the second argument asks for validation data instead of test data.
        model: the network from its seed.
        base: class of the base optimizer, and its options.
        epochs: how long a run trains; or `steps`.
        eigenvalue: whether the largest Hessian eigenvalue is measured at the end of the runs on test data.
        grid: how many contenders it gets: "full", "medium", "light" or "small".
        tuning_seeds, report_seeds: how many runs each contender gets on validation data and on test data.
    """

    name: str
    title: str
    metric: str
    load: Callable[[int, bool], Data]
    model: Callable[[int], nn.Module]
    base: type[torch.optim.Optimizer]
    base_options: Mapping[str, Any]
    batch_size: int
    epochs: int = 0
    steps: int = 0
    warmup_steps: int = 0
    eigenvalue: bool = False
    grid: str = "light"
    tuning_seeds: int = 3
    report_seeds: int = 5

    @property
    def sign(self) -> float:
        """Times the metric, higher is better."""
        return -1.0 if self.metric == "loss" else 1.0

    def settings(self) -> dict[str, Any]:
        """What its runs share, JSON-ready."""
        names = ("title", "metric", "batch_size", "epochs", "steps", "warmup_steps")
        shared = {name: getattr(self, name) for name in names if getattr(self, name)}
        return {**shared, "base": self.base.__name__, "base_options": dict(self.base_options)}

    def is_failure(self, value: float, targets: Tensor) -> bool:
        """Whether a run got no further than a guess: not finite, or about as good as knowing the classes' frequencies."""
        frequencies = torch.bincount(targets.flatten()).double() / targets.numel()
        if not math.isfinite(value):
            return True
        if self.metric == "loss":
            return value > 0.95 * float(torch.special.entr(frequencies).sum())
        return value < 2 * float(frequencies.max())


def small_weights(model: nn.Module, seed: int, std: float = 0.02) -> nn.Module:
    """`model` with weights of linear layers, convolutions and embeddings drawn anew from N(0, std^2), their biases 0."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
                module.weight.normal_(0.0, std, generator=random)
                if getattr(module, "bias", None) is not None:
                    module.bias.zero_()
    return model
