"""Groups without weight decay for biases and norms, as timm's `param_groups_weight_decay` makes them.

With timm's `create_optimizer_v2`, give FusedGAM the instance: `FusedGAM(None, create_optimizer_v2(model, "sgd", lr=0.1))`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from examples.digits.net import conv_net
from examples.loops.common import accuracy, loader, main
from gam_fused import FusedGAM


def groups_of(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two param groups: 1-D parameters (biases, norms) without weight decay and unperturbed, the others with both."""
    no_decay = [p for p in model.parameters() if p.ndim <= 1]
    decay = [p for p in model.parameters() if p.ndim > 1]
    return [
        {"params": no_decay, "weight_decay": 0.0, "perturb": False},
        {"params": decay, "weight_decay": weight_decay},
    ]


def train(epochs: int, limit: int | None = None) -> float:
    """Returns the test accuracy."""
    torch.manual_seed(0)
    model = conv_net(seed=0)
    optimizer = FusedGAM(groups_of(model, 5e-4), torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True, model=model)
    for _ in range(epochs):
        for x, y in loader(64, limit):
            optimizer.step(lambda x=x, y=y: cross_entropy(model(x), y))
    return accuracy(model)


if __name__ == "__main__":
    main(train)
