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
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("lightning", reason="needs the package lightning")

import lightning.pytorch as pl
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.utilities import grad_norm

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
    assert result.global_step == len(losses) == steps
    assert module.outputs == pytest.approx(losses)
    assert optimizer.skipped_steps == 0


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


class Hooked(Module):
    """`act`, called in the given hook."""

    def __init__(self, where, act, **options):
        super().__init__(**options)
        self.act = act
        if where != "callback":
            setattr(self, where, lambda *_, **__: act(self))


class ActingCallback(pl.Callback):
    def on_before_optimizer_step(self, trainer, module, optimizer):
        module.act(module)


def clip_to_norm(module):
    clip_grad_norm_(module.parameters(), 0.05)


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("where", ["on_before_optimizer_step", "configure_gradient_clipping", "callback"])
def test_hooks_act_on_the_direction(where, precision, accumulate):
    """The bits of a loop that acts right before the base optimizer's update, and all but the bits of `max_grad_norm`."""
    module, reference, clipped = Hooked(where, clip_to_norm), Module(), Module()
    more = [ActingCallback()] if where == "callback" else []
    result = fit(module, precision=precision, accumulate_grad_batches=accumulate, more=more)
    _, optimizer = plain_loop(reference, precision, accumulate, hook=clip_to_norm)
    same(contents(module, result.optimizers[0]), contents(reference, optimizer))
    plain_loop(clipped, precision, accumulate, clip=0.05)
    for p, q in zip(module.parameters(), clipped.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("where", ["on_before_optimizer_step", "callback"])
def test_hooks_of_manual_and_automatic_optimization(where, manual):
    module, reference = Hooked(where, clip_to_norm, manual=manual), Module()
    result = fit(module, more=[ActingCallback()] if where == "callback" else [])
    _, optimizer = plain_loop(reference, hook=clip_to_norm)
    same(contents(module, result.optimizers[0]), contents(reference, optimizer))
    assert result.global_step == 2 * BATCHES


class Recorder(Module):
    """Notes order, arguments and what lies in weights, buffers and gradients when a hook is called."""

    def __init__(self, **options):
        super().__init__(**options)
        self.calls, self.steps = [], []

    def training_step(self, batch, batch_idx):
        if not self.calls or self.calls[-1][0] != "forward":
            self.calls.append(("forward", self.state()))
        return super().training_step(batch, batch_idx)

    def state(self):
        return freeze([dict(self.net.named_parameters())])

    def on_before_optimizer_step(self, optimizer):
        self.log_dict(grad_norm(self, 2))
        self.calls.append(("module", self.state(), optimizer, float(self.norm()), torch.is_grad_enabled()))
        self.tracked = int(self.net[1].num_batches_tracked)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.calls.append(("clipping", optimizer, gradient_clip_val, gradient_clip_algorithm))
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        self.calls.append(("clipped", float(self.norm())))

    def norm(self):
        return torch.stack([p.grad.norm() for p in self.parameters()]).norm()


class RecordingCallback(pl.Callback):
    def on_before_optimizer_step(self, trainer, module, optimizer):
        module.calls.append(("callback", optimizer))


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_order_and_arguments_of_the_hooks(precision):
    module = Recorder()
    clip = {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "norm"}
    result = fit(module, precision=precision, max_epochs=1, limit_train_batches=1, more=[RecordingCallback()], **clip)
    optimizer = result.optimizers[0]
    assert [call[0] for call in module.calls] == ["forward", "callback", "module", "clipping", "clipped"]
    (_, before), (_, given), (_, state, given_too, norm, grad), clipping, (_, clipped) = module.calls
    same(state, before)  # unperturbed
    assert given is given_too is optimizer
    assert clipping[1:] == (optimizer, 0.05, "norm")
    assert grad
    assert norm == pytest.approx(float(optimizer.diagnostics()["direction_norm"]), rel=1e-5)
    assert norm > 0.06
    assert clipped == pytest.approx(0.05, rel=1e-4)
    assert module.tracked == 1  # buffers have moved once
    assert float(result.callback_metrics["grad_2.0_norm_total"]) == pytest.approx(norm, rel=1e-2)


def test_hooks_that_draw_random_numbers_draw_new_ones_in_every_step():
    drawn = []
    fit(Hooked("on_before_optimizer_step", lambda module: drawn.append(float(torch.rand(())))), max_epochs=1)
    assert len(set(drawn)) == BATCHES


@pytest.mark.parametrize("precision", PRECISIONS)
def test_hooks_do_not_see_a_skipped_step(precision):
    norms = []

    class Spoilt(Hooked):
        def loss(self, batch):
            return super().loss(batch) * (float("inf") if self.global_step == 3 else 1.0)

    module = Spoilt("configure_gradient_clipping", lambda m: norms.append(next(m.parameters()).grad.norm()))
    result = fit(module, precision=precision, max_epochs=1)
    assert result.optimizers[0].skipped_steps == 1
    assert len(norms) == BATCHES - 1 == result.global_step - 1
    assert torch.stack(norms).isfinite().all()


@pytest.mark.parametrize("hook", [False, True])
def test_clipping_by_value(hook):
    def clip(module):
        clip_grad_value_(module.parameters(), 0.02)

    module, reference = Hooked("on_before_optimizer_step", lambda module: None) if hook else Module(), Module()
    result = fit(module, gradient_clip_val=0.02, gradient_clip_algorithm="value")
    _, optimizer = plain_loop(reference, hook=clip)
    same(contents(module, result.optimizers[0]), contents(reference, optimizer))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_plugin_may_clip_in_its_own_way(precision):
    module, reference = Module(), Module()
    result = trainer(precision, gradient_clip_val=1.0)
    plugin = result.strategy.precision_plugin
    own = {"clip_grad_by_norm": lambda self, optimizer, clip_val: clip_to_norm(module)}
    plugin.__class__ = type("Own", (type(plugin),), own)
    torch.manual_seed(3)
    result.fit(module, DataLoader(data(), 4))
    _, optimizer = plain_loop(reference, precision, hook=clip_to_norm)
    same(contents(module, result.optimizers[0]), contents(reference, optimizer))


def test_a_plugin_that_steps_in_its_own_way_is_an_error():
    class Own(Precision):
        def optimizer_step(self, optimizer, model, closure, **kwargs):
            return super().optimizer_step(optimizer, model=model, closure=closure, **kwargs)

    with pytest.raises(RuntimeError, match=r"Own\.optimizer_step"):
        fit(Module(), precision=None, plugins=[Own()])


@pytest.mark.parametrize("manual", [False, True])
def test_where_no_hook_is_defined_the_update_stays_fused(manual):
    def never(*_, **__):
        raise AssertionError("the base optimizer was stepped by itself")

    module = Clipping(0.05) if manual else Module()
    configure = module.configure_optimizers

    def configure_optimizers():
        configured = configure()
        configured["optimizer"].base_optimizer.step = never
        return configured

    module.configure_optimizers = configure_optimizers
    fit(module, max_epochs=1, gradient_clip_val=None if manual else 0.05)
    assert len(module.outputs) == BATCHES


def test_the_optimizers_own_limit_rests_while_the_trainer_clips():
    for own in (None, 0.001):
        module, reference = Module(max_grad_norm=own), Module()
        result = fit(module, gradient_clip_val=0.05)
        _, optimizer = plain_loop(reference, clip=0.05)
        same(contents(module, result.optimizers[0]), contents(reference, optimizer))
        assert result.optimizers[0].max_grad_norm == own


def test_an_error_in_a_hook_leaves_weights_and_hooks_as_they_were():
    def fail(module):
        raise ZeroDivisionError

    module = Hooked("configure_gradient_clipping", fail, max_grad_norm=7.0)
    start, result = freeze(dict(module.net.named_parameters())), trainer(gradient_clip_val=0.05)
    with pytest.raises(ZeroDivisionError):
        result.fit(module, DataLoader(data(), 4))
    same(freeze(dict(module.net.named_parameters())), start)
    optimizer = result.optimizers[0]
    assert optimizer.max_grad_norm == 7.0
    module.configure_gradient_clipping = lambda *_, **__: None
    torch.manual_seed(3)
    result = fit(module)
    _, optimizer = plain_loop(reference := Module())
    for p, q in zip(module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-5, atol=2e-6)


class Clipping(Module):
    """Manual optimization that clips every second step, before it or in its closure."""

    def __init__(self, limit, algorithm="norm", in_closure=False):
        super().__init__(manual=True)
        self.clip = lambda: self.clip_gradients(self.optimizers(), limit, algorithm)
        self.in_closure = in_closure

    def training_step(self, batch, batch_idx):
        if batch_idx % 2 == 0 and not self.in_closure:
            self.clip()
        return super().training_step(batch, batch_idx)

    def on_after_backward(self):
        if self.in_closure:
            self.clip()


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_by_hand_clips_the_next_step(algorithm):
    module, reference, steps = Clipping(0.02, algorithm), Module(), []

    def clip(plain):
        steps.append(None)
        if len(steps) % 2 == 1:
            (clip_grad_norm_ if algorithm == "norm" else clip_grad_value_)(plain.parameters(), 0.02)

    fit(module)
    plain_loop(reference, hook=clip)
    for p, q in zip(module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("manual", [False, True])
def test_clipping_the_gradients_of_a_pass_is_an_error(manual):
    module = Clipping(0.02, in_closure=True)
    module.automatic_optimization = not manual
    with pytest.raises(RuntimeError, match=r"configure_gradient_clipping.*before optimizer\.step"):
        fit(module)


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
