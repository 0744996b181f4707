"""Hugging Face Accelerate: `prepare`, `backward`, and a closure over four micro-batches."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy

from examples.digits.net import conv_net
from examples.loops.common import accuracy, loader, main
from gam_fused import FusedGAM


def train(epochs: int, limit: int | None = None, **accelerator_options) -> float:
    """Returns the test accuracy."""
    # The micro-batches of a step have to be in the closure, which every pass runs. `accelerator.accumulate`, and with it
    # Accelerator(gradient_accumulation_steps=4), would leave the last one to the passes.
    accelerator = Accelerator(**accelerator_options)
    torch.manual_seed(0)
    model = conv_net(seed=0)
    optimizer = FusedGAM(model, torch.optim.SGD, lr=0.05, momentum=0.9, grad_scaler=accelerator.scaler)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    model, optimizer, batches, schedule = accelerator.prepare(model, optimizer, loader(64, limit), schedule)
    for _ in range(epochs):
        for x, y in batches:

            def closure(x=x, y=y):
                losses = []
                for i, (micro_x, micro_y) in enumerate(zip(x.chunk(4), y.chunk(4), strict=True)):
                    with accelerator.no_sync(model) if i < 3 else nullcontext():  # DDP averages once per pass
                        loss = cross_entropy(model(micro_x), micro_y) / 4
                        accelerator.backward(loss)
                        losses.append(loss.detach())
                return torch.stack(losses).sum()

            optimizer.step(closure)
            schedule.step()
    return accuracy(accelerator.unwrap_model(model))


if __name__ == "__main__":
    main(train)
