"""Lightning's Trainer gives the same bits as a plain loop: precision, accumulation, clipping, both kinds of optimization."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from gam_helpers import freeze, make, mixed_net, same
from torch.utils.data import DataLoader

pytest.importorskip("lightning", reason="needs the package lightning")

import lightning.pytorch as pl
from lightning.pytorch.plugins import Precision
from lightning_loops import BATCHES, PRECISIONS, Module, contents, data, fit, plain_loop, trainer

pytestmark = [
    pytest.mark.frameworks,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_automatic_optimization(precision, accumulate, clip):
    module, reference = Module(), Module()
    result = fit(module, precision=precision, accumulate_grad_batches=accumulate, gradient_clip_val=clip)
    losses, optimizer = plain_loop(reference, precision, accumulate, clip)
    same(contents(module, result.optimizers[0]), contents(reference, optimizer))
    steps = 2 * -(-BATCHES // accumulate)
    assert result.global_step == len(losses) == steps
    assert module.outputs == pytest.approx(losses)
    assert optimizer.skipped_steps == 0


class Lengths(Module):
    """Notes how many samples each pass sees of each micro-batch."""

    def __init__(self, **options):
        super().__init__(**options)
        self.lengths, self.kinds = [], set()

    def loss(self, batch):
        self.lengths.append(len(batch[0]))
        self.kinds.add(type(batch))
        return super().loss(batch)


class Taking(Module):
    """Takes what it needs out of its batch."""

    def loss(self, batch):
        y, x = batch.pop(), batch.pop()
        return super().loss([x, y])


@pytest.mark.parametrize("fraction", [1, 1 / 2])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_module_that_takes_things_out_of_its_batch(accumulate, fraction):
    taking, reading = Taking(flatness_fraction=fraction), Module(flatness_fraction=fraction)
    taken, read = (fit(m, accumulate_grad_batches=accumulate).optimizers[0] for m in (taking, reading))
    same(contents(taking, taken), contents(reading, read))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("fraction", "part", "accumulate"), [(1 / 4, 2, 1), (3 / 4, 3, 4)])
def test_flatness_from_a_part_of_the_batch(fraction, part, accumulate, precision):
    """Nothing has to be said but the fraction."""
    module, reference = Lengths(flatness_fraction=fraction), Lengths(flatness_fraction=fraction)
    result = fit(module, precision=precision, accumulate_grad_batches=accumulate)
    losses, optimizer = plain_loop(reference, precision, accumulate)
    same(contents(module, result.optimizers[0]), contents(reference, optimizer))
    assert module.lengths == reference.lengths
    assert module.lengths[: 5 * accumulate] == accumulate * [4] + 4 * accumulate * [part]
    assert module.kinds == {list}
    assert result.global_step == len(losses) == 2 * -(-BATCHES // accumulate)
    assert module.outputs == pytest.approx(losses)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_flatness_from_a_part_of_the_batch_in_manual_optimization(precision):
    module, reference = Lengths(manual=True, flatness_fraction=3 / 4), Lengths(flatness_fraction=3 / 4)
    result = fit(module, precision=precision)
    losses, optimizer = plain_loop(reference, precision)
    same(contents(module, result.optimizers[0]), contents(reference, optimizer))
    assert module.lengths[:5] == [4, 3, 3, 3, 3]
    assert result.global_step == len(losses)
    assert float(result.callback_metrics["loss"]) == pytest.approx(sum(losses[BATCHES:]) / BATCHES, rel=1e-5)


def test_the_fraction_can_be_scheduled():
    module = Lengths()
    module.on_train_batch_start = lambda batch, i: setattr(
        module.trainer.optimizers[0], "flatness_fraction", (1, 3 / 4)[i % 2]
    )
    fit(module, max_epochs=1, limit_train_batches=3)
    assert module.lengths == [4] * 4 + [4, 3, 3, 3, 3] + [4] * 4


def test_a_batch_alone_is_passed_on_by_its_position():
    """`training_step` takes no `batch_idx`, and calls the batch as it likes."""
    seen = []

    class Spy(Module):
        def training_step(self, samples):
            seen.append(len(samples[0]))
            return self.loss(samples)

    fit(Spy(flatness_fraction=1 / 2), limit_train_batches=1, max_epochs=1)
    assert seen == [4, 2, 2, 2, 2]


@pytest.mark.parametrize("manual", [False, True])
def test_without_the_callback_a_part_is_an_error(manual):
    with pytest.raises((ValueError, RuntimeError), match="GAMCallback"):
        fit(Module(manual=manual, flatness_fraction=1 / 2), callbacks=False)


def test_a_manual_step_without_its_batch_is_an_error():
    class Alone(Module):
        def training_step(self, batch, batch_idx):
            return self.optimizers().step(lambda: self.loss(batch))

    with pytest.raises(ValueError, match=r"flatness_fraction=0\.5 needs the mini-batch: optimizer\.step\(closure, batch\)"):
        fit(Alone(manual=True, flatness_fraction=1 / 2))


def test_a_wrapped_closure_that_lost_the_batch_is_an_error():
    class Wrapping(Module):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            optimizer.step(closure=lambda: optimizer_closure())

    fit(Wrapping(), max_epochs=1, limit_train_batches=1)
    with pytest.raises(RuntimeError, match=r"flatness_fraction=0\.5: Wrapping\.optimizer_step has wrapped its closure"):
        fit(Wrapping(flatness_fraction=1 / 2))


def test_a_training_step_that_draws_its_batches_is_an_error():
    class Drawing(Module):
        def training_step(self, dataloader_iter):
            return self.loss(next(dataloader_iter)[0])

    with pytest.raises(RuntimeError, match=r"training_step\(dataloader_iter\) would draw another batch in every pass"):
        fit(Drawing())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_manual_optimization(precision):
    module, reference = Module(manual=True), Module()
    result = fit(module, precision=precision)
    losses, optimizer = plain_loop(reference, precision)
    same(contents(module, result.optimizers[0]), contents(reference, optimizer))
    assert result.global_step == len(losses)
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


@pytest.mark.parametrize("manual", [False, True])
def test_without_the_callback_hooks_on_gradients_are_an_error(manual):
    """Each would run in every pass; the error names it."""
    kinds = {"on_before_optimizer_step": (Module, pl.Callback)}
    if not manual:
        kinds |= {"on_before_zero_grad": (Module, pl.Callback), "configure_gradient_clipping": (Module,)}
    for name, owners in kinds.items():
        for owner in owners:
            spy = type("Spy", (owner,), {name: lambda *_, **__: None})()
            module = spy if owner is Module else Module()
            module.automatic_optimization = not manual
            with pytest.raises(RuntimeError, match=rf"Spy\.{name} .*GAMCallback"):
                fit(module, callbacks=False, more=[spy] if owner is pl.Callback else [])


class Adversaries(pl.LightningModule):
    """Two optimizers, each toggled for its step, in Lightning's way; only the second's clips."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization, self.nets = False, torch.nn.ModuleList([mixed_net(0), mixed_net(1)])
        self.seen = []

    def configure_optimizers(self):
        return [make(net.parameters(), model=net, lr=0.05) for net in self.nets]

    def loss(self, i, x, y):
        return (self.nets[i](x) - y).square().mean() + (self.nets[0](x) * self.nets[1](x)).mean()

    def training_step(self, batch, batch_idx):
        for i, optimizer in enumerate(self.optimizers()):

            def closure(i=i):
                loss = self.loss(i, *batch)
                self.manual_backward(loss)
                return loss

            with optimizer.toggle_model():
                if i == 1:
                    self.clip_gradients(optimizer, 0.05)
                optimizer.step(closure)

    def on_before_optimizer_step(self, optimizer):
        self.seen.append((optimizer, [p.grad is not None for p in self.parameters()]))


def test_two_optimizers_with_toggling():
    module, plain = Adversaries(), Adversaries()
    result = fit(module, max_epochs=1)
    optimizers = plain.configure_optimizers()
    optimizers[1].max_grad_norm = 0.05
    for optimizer in optimizers:
        optimizer.base_optimizer.register_step_pre_hook(lambda *_: None)
    torch.manual_seed(3)
    for batch in DataLoader(data(), 4):
        for i, optimizer in enumerate(optimizers):
            for j in (0, 1):
                plain.nets[j].requires_grad_(i == j)
            optimizer.step(lambda i=i, batch=batch: plain.loss(i, *batch))
    same(freeze(dict(module.state_dict())), freeze(dict(plain.state_dict())))
    whose = [[True] * 6 + [False] * 6, [False] * 6 + [True] * 6]
    assert module.seen == [(result.optimizers[i], whose[i]) for _ in range(BATCHES) for i in (0, 1)]


def test_gradients_are_zeroed_once_per_step():
    calls = []

    class Spy(Module):
        def on_before_zero_grad(self, optimizer):
            calls.append(freeze(dict(self.net.named_parameters())))

        def training_step(self, batch, batch_idx):
            if batch_idx % 4 == 0 and len(calls) == batch_idx // 4:
                self.start = freeze(dict(self.net.named_parameters()))
            return super().training_step(batch, batch_idx)

    module = Spy()
    fit(module, max_epochs=1, accumulate_grad_batches=4)
    assert len(calls) == 3
    same(calls[-1], module.start)


def test_a_step_that_never_runs_its_closure_is_an_error():
    module = Module()
    module.optimizer_step = lambda epoch, batch_idx, optimizer, optimizer_closure: None
    with pytest.raises(RuntimeError, match=r"Module\.optimizer_step has not run its closure"):
        fit(module)


def test_what_lightning_calls_its_own():
    """The private names that `integrations` uses; a Lightning without one of them needs another way there."""
    assert callable(Precision._after_closure)
    assert callable(Precision._wrap_closure)
    assert not hasattr(pl.Callback, "configure_gradient_clipping")


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
