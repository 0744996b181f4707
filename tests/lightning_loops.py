"""A Lightning module, its trainer, and the plain loop that must give the same bits."""

from __future__ import annotations

import logging
from contextlib import nullcontext

import pytest
import torch
from gam_helpers import freeze, make, mixed_net
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("lightning", reason="needs the package lightning")

import lightning.pytorch as pl
from lightning.pytorch.plugins import MixedPrecision

from gam_fused.integrations.lightning import GAMCallback

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
SCALE = 256.0
BATCHES = 10  # of 4: with an accumulation of 4 the last step of an epoch has 2


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    return TensorDataset(torch.randn(4 * BATCHES, 3, generator=generator), torch.randn(4 * BATCHES, 2, generator=generator))


class Module(pl.LightningModule):
    def __init__(self, manual=False, **options):
        super().__init__()
        self.net, self.options, self.automatic_optimization = mixed_net(), options, not manual
        self.outputs, self.spoil = [], None

    def configure_optimizers(self):
        optimizer = make(self.parameters(), model=self, lr=0.05, **self.options)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), "interval": "step"},
        }

    def loss(self, batch):
        return (self.net(batch[0]) - batch[1]).square().mean()

    def training_step(self, batch, batch_idx):
        if not self.automatic_optimization:
            optimizer = self.optimizers()

            def closure(batch=batch):
                optimizer.zero_grad()
                loss = self.loss(batch)
                self.manual_backward(loss)
                self.log("loss", loss, on_epoch=True, on_step=False)
                return loss

            part = optimizer.optimizer.flatness_fraction < 1.0
            loss = optimizer.step(closure, batch=batch) if part else optimizer.step(closure)
            self.lr_schedulers().step()
            return loss
        loss = self.loss(batch)
        self.log("loss", loss, on_epoch=True, on_step=False, batch_size=4)
        return None if batch_idx == self.spoil else loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if outputs:
            self.outputs.append(float(outputs["loss"]))


def trainer(precision="32-true", callbacks=True, more=(), **options) -> pl.Trainer:
    if precision == "16-mixed":  # the Trainer would take bf16 on a CPU
        scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=3)
        options["plugins"] = [MixedPrecision("16-mixed", "cpu", scaler)]
    else:
        options["precision"] = precision
    options = {"max_epochs": 2, "logger": False, "enable_checkpointing": False, **options}
    callbacks = [*more, *([GAMCallback()] if callbacks else [])]
    return pl.Trainer(
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks, **options
    )


def fit(module: Module, **options) -> pl.Trainer:
    result = trainer(**options)
    torch.manual_seed(3)
    result.fit(module, DataLoader(data(), 4))
    return result


def plain_loop(module: Module, precision="32-true", accumulate=1, clip=None, epochs=2, hook=None):
    """What the Trainer should do, with `hook` before each update. Returns the losses of the steps."""
    configured = module.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=3, enabled=precision == "16-mixed")
    optimizer.grad_scaler, optimizer.max_grad_norm = scaler, clip
    if hook:
        optimizer.base_optimizer.register_step_pre_hook(lambda *_: hook(module))
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    torch.manual_seed(3)
    losses = []
    for _ in range(epochs):
        batches = list(DataLoader(data(), 4))
        for start in range(0, BATCHES, accumulate):

            def closure(batches):
                total = 0.0
                for batch in batches:
                    with torch.autocast("cpu", dtype, cache_enabled=False) if dtype else nullcontext():
                        loss = module.loss(batch) / accumulate
                    scaler.scale(loss).backward()
                    total += loss.detach()
                return total

            losses.append(float(optimizer.step(closure, batches[start : start + accumulate])))
            scaler.update()
            schedule.step()
    return losses, optimizer


def contents(module, optimizer):
    return freeze([dict(module.net.state_dict()), optimizer.state_dict()["state"], optimizer.param_groups[0]["lr"]])
