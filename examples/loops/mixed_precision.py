"""A plain loop in fp16 autocast with a GradScaler, four micro-batches per step, and clipping."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy

from examples.digits.net import conv_net
from examples.loops.common import accuracy, loader, main
from gam_fused import FusedGAM


def train(epochs: int, limit: int | None = None) -> float:
    """Returns the test accuracy."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = conv_net(seed=0).to(device)
    scaler = torch.amp.GradScaler(device)
    optimizer = FusedGAM(model, torch.optim.SGD, lr=0.05, momentum=0.9, grad_scaler=scaler, max_grad_norm=5.0)
    for _ in range(epochs):
        for x, y in loader(64, limit):
            x, y = x.to(device), y.to(device)

            def closure(x=x, y=y):
                total = torch.zeros((), device=device)
                for micro_x, micro_y in zip(x.chunk(4), y.chunk(4), strict=True):
                    with torch.autocast(device, torch.float16):
                        loss = cross_entropy(model(micro_x), micro_y) / 4
                    scaler.scale(loss).backward()  # no unscale_, no clip_grad_norm_: the optimizer does both
                    total += loss.detach()
                return total

            optimizer.step(closure)  # or scaler.step(optimizer, closure)
            scaler.update()
    return accuracy(model)


if __name__ == "__main__":
    main(train)
