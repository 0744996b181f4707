"""Lightning: a callback lets the Trainer accumulate, clip and scale as for any optimizer."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch.nn.functional import cross_entropy

from examples.digits.net import conv_net
from examples.loops.common import accuracy, loader, main
from gam_fused import FusedGAM
from gam_fused.integrations.lightning import GAMCallback


class Digits(pl.LightningModule):
    """Nothing here knows of the passes: automatic optimization as usual."""

    def __init__(self):
        super().__init__()
        self.net = conv_net(seed=0)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = cross_entropy(self.net(x), y)
        self.log("loss", loss, on_epoch=True, prog_bar=True)  # of the unperturbed pass
        return loss

    def configure_optimizers(self):
        optimizer = FusedGAM(self, torch.optim.SGD, lr=0.05, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train(epochs: int, limit: int | None = None, **trainer_options: Any) -> float:
    """Returns the test accuracy. Four micro-batches of 16 images make a step."""
    pl.seed_everything(0, verbose=False)
    model = Digits()
    options = {"accumulate_grad_batches": 4, "gradient_clip_val": 5.0, "devices": 1}
    options |= {"logger": False, "enable_checkpointing": False}
    trainer = pl.Trainer(max_epochs=epochs, callbacks=[GAMCallback()], **{**options, **trainer_options})
    trainer.fit(model, loader(16, limit))
    return accuracy(model.net)


if __name__ == "__main__":
    main(train)
