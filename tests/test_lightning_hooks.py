"""Under Lightning's Trainer: hooks on gradients, and clipping, act on the direction of the step."""

from __future__ import annotations

import pytest
import torch
from gam_helpers import freeze, same
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.utils.data import DataLoader

pytest.importorskip("lightning", reason="needs the package lightning")

import lightning.pytorch as pl
from lightning.pytorch.plugins import Precision
from lightning.pytorch.utilities import grad_norm
from lightning_loops import BATCHES, PRECISIONS, Module, contents, data, fit, plain_loop, trainer

pytestmark = [
    pytest.mark.frameworks,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]


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
def test_where_no_hook_is_defined_the_update_stays_fused(manual, monkeypatch):
    def never(*_, **__):
        raise AssertionError("the base optimizer was stepped by itself")

    module = Clipping(0.05) if manual else Module()
    configure = module.configure_optimizers

    def configure_optimizers():
        configured = configure()
        monkeypatch.setattr(type(configured["optimizer"].base_optimizer), "step", never)
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
