"""Hugging Face Trainer: a mixin makes the optimizer's passes in `training_step`."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments, set_seed

from examples.digits.net import conv_net
from examples.loops.common import accuracy, main, training_data
from gam_fused import FusedGAM
from gam_fused.integrations.transformers import GAMTrainerMixin


class Digits(nn.Module):
    """A model as the Trainer takes it: keyword arguments in, a loss out."""

    def __init__(self):
        super().__init__()
        self.net = conv_net(seed=0)

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(images)
        return {"loss": cross_entropy(logits, labels), "logits": logits}


class GAMTrainer(GAMTrainerMixin, Trainer):
    """The Trainer, with FusedGAM."""


def train(epochs: int, limit: int | None = None, **arguments: Any) -> float:
    """Returns the test accuracy. Four micro-batches of 16 images make a step."""
    set_seed(0)
    model = Digits()
    with tempfile.TemporaryDirectory() as folder:
        options = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 4, "max_grad_norm": 5.0}
        options |= {"report_to": "none", "save_strategy": "no", "output_dir": folder, "disable_tqdm": True}
        trainer = GAMTrainer(
            model,
            TrainingArguments(num_train_epochs=epochs, lr_scheduler_type="cosine", **{**options, **arguments}),
            train_dataset=[{"images": x, "labels": y} for x, y in training_data(limit)],
            optimizer_cls_and_kwargs=(FusedGAM, {"base_optimizer": torch.optim.SGD, "lr": 0.05, "momentum": 0.9}),
        )
        trainer.train()
    return accuracy(model.net)


if __name__ == "__main__":
    main(train)
