"""Lightning's Trainer gives the same bits as a plain loop: precision, accumulation, clipping, both kinds of optimization."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from gam_helpers import freeze, make, mixed_net, same
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("lightning", reason="needs the package lightning")

import lightning.pytorch as pl
from lightning.pytorch.plugins.precision import MixedPrecision

from gam_fused.integrations.lightning import GAMCallback

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
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
        self.hooks, self.outputs, self.spoil = 0, [], None

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

            def closure():
                optimizer.zero_grad()
                loss = self.loss(batch)
                self.manual_backward(loss)
                self.log("loss", loss, on_epoch=True, on_step=False)
                return loss

            loss = optimizer.step(closure)
            self.lr_schedulers().step()
            return loss
        loss = self.loss(batch)
        self.log("loss", loss, on_epoch=True, on_step=False, batch_size=4)
        return None if batch_idx == self.spoil else loss

    def on_before_optimizer_step(self, optimizer):
        assert next(self.parameters()).grad is not None
        self.hooks += 1

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if outputs:
            self.outputs.append(float(outputs["loss"]))


def trainer(precision="32-true", callbacks=True, **options) -> pl.Trainer:
    if precision == "16-mixed":  # the Trainer would take bf16 on a CPU
        scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=3)
        options["plugins"] = [MixedPrecision("16-mixed", "cpu", scaler)]
    else:
        options["precision"] = precision
    options = {"max_epochs": 2, "logger": False, "enable_checkpointing": False, **options}
    callbacks = [GAMCallback()] if callbacks else []
    return pl.Trainer(
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks, **options
    )


def fit(module: Module, **options) -> pl.Trainer:
    result = trainer(**options)
    torch.manual_seed(3)
    result.fit(module, DataLoader(data(), 4))
    return result


def plain_loop(module: Module, precision="32-true", accumulate=1, clip=None, epochs=2):
    """What the Trainer should do. Returns the losses of the steps."""
    configured = module.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=3, enabled=precision == "16-mixed")
    optimizer.grad_scaler, optimizer.max_grad_norm = scaler, clip
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    torch.manual_seed(3)
    losses = []
    for _ in range(epochs):
        batches = list(DataLoader(data(), 4))
        for start in range(0, BATCHES, accumulate):

            def closure(start=start, batches=batches):
                total = 0.0
                for batch in batches[start : start + accumulate]:
                    with torch.autocast("cpu", dtype, cache_enabled=False) if dtype else nullcontext():
                        loss = module.loss(batch) / accumulate
                    scaler.scale(loss).backward()
                    total += loss.detach()
                return total

            losses.append(float(optimizer.step(closure)))
            scaler.update()
            schedule.step()
    return losses, optimizer


def contents(module, optimizer):
    return freeze([dict(module.net.state_dict()), optimizer.state_dict()["state"], optimizer.param_groups[0]["lr"]])


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_automatic_optimization(precision, accumulate, clip):
    module, reference = Module(), Module()
    result = fit(module, precision=precision, accumulate_grad_batches=accumulate, gradient_clip_val=clip)
    losses, optimizer = plain_loop(reference, precision, accumulate, clip)
    same(contents(module, result.optimizers[0]), contents(reference, optimizer))
    steps = 2 * -(-BATCHES // accumulate)
    assert result.global_step == module.hooks == len(losses) == steps
    assert module.outputs == pytest.approx(losses)
    assert optimizer.skipped_steps == 0


@pytest.mark.parametrize("precision", PRECISIONS)
def test_manual_optimization(precision):
    module, reference = Module(manual=True), Module()
    result = fit(module, precision=precision)
    losses, optimizer = plain_loop(reference, precision)
    same(contents(module, result.optimizers[0]), contents(reference, optimizer))
    assert result.global_step == module.hooks == len(losses)
    assert module.outputs == pytest.approx(losses)


@pytest.mark.parametrize("manual", [False, True])
def test_only_the_unperturbed_pass_is_logged(manual):
    module, reference = Module(manual=manual), Module()
    result = fit(module, max_epochs=1)
    losses, _ = plain_loop(reference, epochs=1)
    assert float(result.callback_metrics["loss"]) == pytest.approx(sum(losses) / len(losses), rel=1e-5)


@pytest.mark.parametrize("precision", PRECISIONS[:2])
@pytest.mark.parametrize("manual", [False, True])
def test_without_the_callback_plain_settings_train_the_same(manual, precision):
    module, reference = Module(manual=manual), Module()
    result = fit(module, precision=precision, callbacks=False)
    _, optimizer = plain_loop(reference, precision)
    same(contents(module, result.optimizers[0]), contents(reference, optimizer))
    assert result.global_step == 2 * BATCHES


@pytest.mark.parametrize("options", [{"accumulate_grad_batches": 4}, {"gradient_clip_val": 1.0}, {"precision": "16-mixed"}])
def test_without_the_callback_other_settings_are_an_error(options):
    with pytest.raises(RuntimeError, match=r"gam_fused\.integrations"):
        fit(Module(), callbacks=False, **options)


def test_clipping_by_value_is_an_error():
    with pytest.raises(ValueError, match="value"):
        fit(Module(), gradient_clip_val=1.0, gradient_clip_algorithm="value")


def test_the_trainer_is_left_as_it_was_and_serves_other_optimizers():
    module = Module()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.05)
    result = trainer(accumulate_grad_batches=4, gradient_clip_val=0.05)
    loop, plugin = result.fit_loop.epoch_loop.automatic_optimization, result.strategy.precision_plugin
    torch.manual_seed(3)
    result.fit(module, DataLoader(data(), 4))
    assert result.fit_loop.epoch_loop.automatic_optimization is loop
    assert result.strategy.precision_plugin is plugin
    bare = Module()
    bare.configure_optimizers = lambda: torch.optim.SGD(bare.parameters(), lr=0.05)
    fit(bare, callbacks=False, accumulate_grad_batches=4, gradient_clip_val=0.05)
    same(freeze(dict(module.net.state_dict())), freeze(dict(bare.net.state_dict())))


def test_a_training_step_may_return_none():
    """One of four micro-batches is left out; with an accumulation of 1 there is no update, and no trace of one."""
    module = Module()
    module.spoil = 3
    result = fit(module, max_epochs=1, accumulate_grad_batches=4)
    assert result.global_step == 3
    assert len(module.outputs) == 3
    module = Module()
    module.spoil = 0
    start = copy.deepcopy(module.net.state_dict())
    result = fit(module, max_epochs=1, limit_train_batches=1)
    same(freeze(dict(module.net.state_dict())), freeze(dict(start)))
    assert result.global_step == 1


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_a_checkpoint_resumes(precision, tmp_path):
    whole, half, rest = Module(), Module(), Module()
    for module in (whole, half, rest):
        module.on_train_batch_start = lambda batch, i, m=module: torch.manual_seed(100 * m.current_epoch + i) and None
    options = {"precision": precision, "accumulate_grad_batches": 4}
    fit(whole, max_epochs=2, **options)
    fit(half, max_epochs=1, **options).save_checkpoint(tmp_path / "half.ckpt")
    result = trainer(max_epochs=2, **options)
    result.fit(rest, DataLoader(data(), 4), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert result.global_step == 6
    same(contents(rest, result.optimizers[0]), contents(whole, whole.trainer.optimizers[0]))


def test_the_example():
    from examples.loops.lightning import train

    assert train(epochs=6, limit=256, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu") > 0.5


def test_the_package_imports_no_framework_by_itself():
    code = "import sys, gam_fused; print({'lightning', 'transformers', 'accelerate'} & set(sys.modules))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "set()"
