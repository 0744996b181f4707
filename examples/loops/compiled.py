"""torch.compile for the model; on a GPU, all four passes and the update in one CUDA graph instead."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy

from examples.digits.net import conv_net
from examples.loops.common import accuracy, loader, main
from gam_fused import FusedGAM
from gam_fused.graphs import capture_step


def train(epochs: int, limit: int | None = None, backend: str = "inductor") -> float:
    """Returns the test accuracy."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = conv_net(seed=0).to(device)
    optimizer = FusedGAM(model, torch.optim.SGD, lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader(64, limit)))
    if device == "cuda":
        step = capture_step(optimizer, lambda x, y: cross_entropy(model(x), y), next(iter(loader(64, limit))))
    else:
        fast = torch.compile(model, backend=backend)

        def step(x, y):
            return optimizer.step(lambda: cross_entropy(fast(x), y))

    for _ in range(epochs):
        for x, y in loader(64, limit):
            step(x, y)
            schedule.step()
    return accuracy(model)


if __name__ == "__main__":
    main(train)
