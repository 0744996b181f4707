"""Whatever ends a measure, its result, an error in any pass or Ctrl-C, all is bit for bit as it was before."""

from __future__ import annotations

import os
import random
import signal
import time

import numpy
import pytest
import torch
from gam_helpers import batch, bits, freeze, mixed_net, regression, same
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gam_fused import flatness
from gam_fused.integrations.flatness_log import figures

SHOTS = int(os.environ.get("GAM_FUSED_SHOTS", "60"))
MEASURES = {
    "value": lambda loss, *p: loss(),
    "hessian_eigenvalues": lambda loss, *p: flatness.hessian_eigenvalues(loss, *p, k=2, max_iterations=20),
    "hutchinson": lambda loss, *p: flatness.hessian_trace(loss, *p, samples=3),
    "hutch++": lambda loss, *p: flatness.hessian_trace(loss, *p, samples=6, method="hutch++"),
    "spectral_density": lambda loss, *p: flatness.spectral_density(loss, *p, probes=2, steps=3),
    "zeroth_order_flatness": lambda loss, *p: flatness.zeroth_order_flatness(loss, *p, rho=0.1, steps=2),
    "first_order_flatness": lambda loss, *p: flatness.first_order_flatness(loss, *p, rho=0.1, steps=2),
    "zeroth_order_estimate": lambda loss, *p: flatness.zeroth_order_estimate(loss, *p, rho=0.1),
    "first_order_estimate": lambda loss, *p: flatness.first_order_estimate(loss, *p, rho=0.1),
    "loss_landscape": lambda loss, *p: flatness.loss_landscape(loss, *p, directions=1, points=3),
    "local_minima_density": lambda loss, *p: flatness.local_minima_density(loss, *p, directions=2, radius=0.02),
}


class Task:
    """A network in a mixed state of modes, gradients and flags, and a loader that shuffles; losses fail when told to."""

    def __init__(self, training=True):
        self.model = mixed_net()
        self.model[2].eval()
        frozen, *others = self.model.parameters()
        frozen.requires_grad_(False)
        for p in others[::2]:
            p.grad = torch.randn_like(p)
        self.grads = [p.grad for p in self.model.parameters()]
        self.generator = torch.Generator().manual_seed(3)
        self.loader = DataLoader(TensorDataset(*batch(12)), 4, shuffle=True, generator=self.generator)
        self.calls, self.fail_at, self.fail = 0, None, None
        self.loss = flatness.over_batches(self.model, self.criterion, self.loader, training=training)
        self.plain = lambda: self.criterion(self.model(batch()[0]), batch()[1])

    def criterion(self, output, target):
        self.calls += 1
        random.random(), numpy.random.rand()
        if self.calls == self.fail_at:
            self.fail()
        return nn.functional.mse_loss(output, target)

    def contents(self):
        assert all(p.grad is g for p, g in zip(self.model.parameters(), self.grads, strict=True))
        return freeze(
            [
                list(self.model.state_dict().items()),
                self.grads,
                [p.requires_grad for p in self.model.parameters()],
                [m.training for m in self.model.modules()],
                [torch.get_rng_state(), self.generator.get_state()],
                [
                    repr(random.getstate()),
                    repr(numpy.random.get_state(legacy=False)["state"]["key"].tolist()),
                    numpy.random.get_state()[2],
                ],
            ]
        )


def raise_key_error():
    raise KeyError("a bad batch")


def press_ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.2)  # a signal arrives at the next bytecode


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MEASURES)
def test_after_a_result(name, training):
    task = Task(training)
    before = task.contents()
    MEASURES[name](task.loss)
    assert task.calls >= 3
    same(task.contents(), before)


@pytest.mark.parametrize("name", [n for n in MEASURES if n != "value"])
def test_after_a_result_of_a_plain_function_and_its_module(name):
    task = Task()
    before = task.contents()
    MEASURES[name](task.plain, task.model)
    same(task.contents(), before)


@pytest.mark.parametrize(("fail", "error"), [(raise_key_error, KeyError), (press_ctrl_c, KeyboardInterrupt)])
@pytest.mark.parametrize("name", MEASURES)
def test_after_an_error_or_ctrl_c_in_any_pass(name, fail, error):
    task = Task()
    MEASURES[name](task.loss)
    passes = task.calls
    before = task.contents()
    at = range(1, passes + 1) if fail is raise_key_error else sorted({1, passes // 2 + 1, passes})
    for task.fail_at in at:
        task.calls, task.fail = 0, fail
        with pytest.raises(error):
            MEASURES[name](task.loss)
        assert task.calls == task.fail_at
        same(task.contents(), before)
    task.fail_at = None
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_after_a_signal_at_any_moment():
    class Stopped(BaseException):
        pass

    def stop(*_):
        raise Stopped

    task, moments, raised = Task(), random.Random(0), 0
    handler = signal.signal(signal.SIGALRM, stop)
    try:
        start = time.perf_counter()
        flatness.first_order_flatness(task.loss, rho=0.1, steps=1)
        lasts = time.perf_counter() - start
        before = task.contents()
        for _ in range(SHOTS):
            try:
                try:
                    signal.setitimer(signal.ITIMER_REAL, max(1e-6, lasts * moments.random()))
                    flatness.first_order_flatness(task.loss, rho=0.1, steps=1)
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            except Stopped:
                raised += 1
            same(task.contents(), before)
    finally:
        signal.signal(signal.SIGALRM, handler)
    assert raised > SHOTS / 20


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("name", MEASURES)
def test_the_callers_mode_of_autograd_does_not_matter(name, mode):
    task = Task()
    expected = MEASURES[name](task.loss)
    with mode():
        found = MEASURES[name](task.loss)
        assert not torch.is_grad_enabled() or mode is torch.enable_grad
    for a, b in zip(as_tuple(found), as_tuple(expected), strict=True):
        assert torch.equal(a, b)


def as_tuple(result):
    return result if isinstance(result, tuple) else (result,)


def test_a_loss_that_calls_backward_is_an_error_and_adds_to_no_gradient():
    task = Task()
    before = task.contents()

    def loss():
        value = regression(task.model, *batch())()
        value.backward(retain_graph=True)
        return value

    with pytest.raises(RuntimeError, match="loss_fn called backward"):
        flatness.hessian_trace(loss, task.model)
    same(task.contents(), before)


def test_modes_and_flags_that_a_loss_changes_come_back():
    task = Task()
    before = task.contents()

    def loss():
        task.model.eval()
        value = regression(task.model, *batch())()
        task.model[0].bias.requires_grad_(False)
        return value

    flatness.loss_landscape(loss, task.model, 1, points=3)
    same(task.contents(), before)


def test_the_figures_of_a_log_leave_training_as_it_would_be_without():
    def train(log):
        torch.manual_seed(0)
        model = mixed_net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        data = TensorDataset(*batch(12))
        for x, y in DataLoader(data, 4, shuffle=True):
            optimizer.zero_grad()
            regression(model, x, y)().backward()
            if log:
                figures(model, nn.functional.mse_loss, DataLoader(data, 5, shuffle=True), steps=2, samples=2)
            optimizer.step()
        return list(map(bits, model.state_dict().values()))

    same(train(log=True), train(log=False))


def test_attention_is_differentiated_twice_and_its_kernels_come_back():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    flags = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()
    x = torch.randn(2, 5, 8)
    values = flatness.hessian_eigenvalues(lambda: layer(x).square().mean(), layer)
    assert values.isfinite().all()
    assert (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()) == flags
