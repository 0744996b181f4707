"""One step on a batch, for every kind of optimizer and precision."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from gam_fused import FusedGAM
from gam_fused.graphs import capture_step

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

Step = Callable[[Tensor, Tensor], Tensor]


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    dtype = PRECISIONS[precision]
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def how_to_step(
    options: Namespace,
    network: nn.Module,
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler | None,
    label_smoothing: float,
    example: tuple[Tensor, Tensor],
) -> Step:
    """What takes a step on images and labels, and returns the loss at the weights before it."""
    forward = torch.compile(network) if options.compile else network
    device = example[0].device

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        with autocast(options.precision, device):
            output = forward(x)
        return cross_entropy(output.float(), y, label_smoothing=label_smoothing)

    def plain(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(x, y)
        if scaler:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        else:
            loss.backward()
            optimizer.step()
        return loss.detach()

    def passes(x: Tensor, y: Tensor) -> Tensor:
        loss: Tensor = optimizer.step(lambda batch: loss_of(*batch), (x, y))
        if scaler:
            scaler.update()
        return loss

    if not isinstance(optimizer, FusedGAM):
        return plain
    return capture_step(optimizer, loss_of, example) if options.cuda_graphs else passes
