"""What comes in between: signals whose handlers raise, a step inside a step, threads."""

from __future__ import annotations

import copy
import os
import random
import signal
import threading
import time
import weakref

import pytest
import torch
from gam_helpers import METHODS, backend_params, batch, freeze, make, mlp, regression, same, trainer, weights
from torch import nn
from torch.optim import SGD, AdamW

from gam_fused import FusedGAM
from gam_fused.transaction.interrupts import Interrupts

SHOTS = int(os.environ.get("GAM_FUSED_SHOTS", "60"))


class Stopped(BaseException):
    """What handlers raise here."""


def raise_stopped(*_):
    raise Stopped


@pytest.fixture
def alarm():
    """SIGALRM raises; its timer is off afterwards."""
    before = signal.signal(signal.SIGALRM, raise_stopped)
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("backend", backend_params())
@pytest.mark.parametrize("base", [SGD, AdamW, torch.optim.RMSprop], ids=lambda b: b.__name__)
def test_a_handler_that_raises_at_any_moment_leaves_the_step_done_or_undone(base, backend, alarm):
    """All or nothing of weights, state, buffers and generators, at every one of many random moments."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 40), nn.BatchNorm1d(40), nn.Dropout(0.1), nn.Linear(40, 2))
    x, y = torch.randn(4, 40), torch.randn(4, 2)
    options = {"base_kwargs": {"lr": 0.01, **({"momentum": 0.9} if base is SGD else {})}}
    optimizer = FusedGAM(model.parameters(), base, model=model, backend=backend, **options)
    loss = regression(model, x, y)

    def now():
        return freeze(
            {
                "weights": list(model.parameters()),
                "state": optimizer.state_dict(),
                "buffers": dict(model.named_buffers()),
                "rng": torch.get_rng_state(),
            }
        )

    def timed():
        start = time.perf_counter()
        optimizer.step(loss)
        return time.perf_counter() - start

    lasts = min(timed() for _ in range(10))
    moments, raised = random.Random(0), 0
    for _ in range(SHOTS):
        before = now()
        try:
            try:
                alarm(max(1e-6, lasts * moments.random()))
                optimizer.step(loss)
            finally:
                alarm(0)
        except Stopped:
            raised += 1
            after = now()
            steps = [state["state"]["param_groups"][0]["gam"]["steps_taken"] for state in (before, after)]
            if steps[0] == steps[1]:
                same(after, before)
            else:
                assert not torch.equal(after["weights"][0], before["weights"][0])
        assert all(p.grad is None for p in model.parameters())
    assert raised > SHOTS / 20
    assert signal.getsignal(signal.SIGALRM) is raise_stopped


def test_a_second_signal_waits_while_the_first_is_being_dealt_with():
    """Ctrl-C pressed twice: the second must not cut in half what puts the weights back."""
    order = []

    def handler(number, _):
        order.append(number)
        raise Stopped

    before = [(s, signal.signal(s, handler)) for s in (signal.SIGUSR1, signal.SIGUSR2)]
    try:
        model = mlp()
        optimizer = make(model.parameters(), lr=0.0)
        start, calls = weights(optimizer), []

        def closure():
            calls.append(1)
            if len(calls) == 3:
                signal.raise_signal(signal.SIGUSR1)
            return regression(model, *batch())()

        restore = optimizer.step  # a second signal arrives in abort: the kernel that puts weights back sends it
        backend = None
        optimizer.prepare()
        block = optimizer.session.plan.blocks[0]
        backend = block.kernels

        class Sends:
            def __getattr__(self, name):
                return getattr(backend, name)

            def restore_(self, *arguments):
                signal.raise_signal(signal.SIGUSR2)
                backend.restore_(*arguments)

        block.kernels = Sends()
        with pytest.raises(Stopped):
            restore(closure)
        assert order == [signal.SIGUSR1, signal.SIGUSR2]
        same(weights(optimizer), start)
    finally:
        for s, handler_before in before:
            signal.signal(s, handler_before)


def test_a_handler_that_the_closure_installs_stays():
    def own(*_):
        return None

    before = signal.getsignal(signal.SIGUSR1)
    try:
        model = mlp()
        optimizer = make(model.parameters())

        def closure():
            signal.signal(signal.SIGUSR1, own)
            return regression(model, *batch())()

        optimizer.step(closure)
        assert signal.getsignal(signal.SIGUSR1) is own
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_handlers_are_held_delivered_and_given_back():
    seen = []
    before = signal.signal(signal.SIGUSR1, lambda *_: seen.append("handler"))
    try:
        installed = signal.getsignal(signal.SIGUSR1)
        with Interrupts() as interrupts:
            signal.raise_signal(signal.SIGUSR1)
            seen.append("held")
            interrupts.open()
            seen.append("open")
            signal.raise_signal(signal.SIGUSR1)
            interrupts.close()
            signal.raise_signal(signal.SIGUSR1)
            seen.append("end")
        assert seen == ["held", "handler", "open", "handler", "end", "handler"]
        assert signal.getsignal(signal.SIGUSR1) is installed
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_handler_set_in_a_closure_may_call_the_one_before():
    """In the step and after it: what it got for the handler before is that handler, wherever it calls it from."""
    seen, old = [], []
    before = signal.signal(signal.SIGUSR1, lambda *_: seen.append("first"))

    def chained(number, frame):
        seen.append("second")
        assert len(seen) < 20, "it goes round in circles"
        old[0](number, frame)

    def send():
        seen.clear()
        signal.raise_signal(signal.SIGUSR1)
        return seen == ["second", "first"]

    try:
        with Interrupts() as interrupts:
            interrupts.let_through(lambda: old.append(signal.signal(signal.SIGUSR1, chained)))
            assert interrupts.let_through(send)
            assert not send(), "held"
            interrupts.open()
            assert seen == ["second", "first"]
            interrupts.close()
            interrupts.let_through(lambda: signal.signal(signal.SIGUSR1, old[0]))
            assert not send(), "held"
            assert interrupts.let_through(lambda: list(seen)) == ["first"]
            interrupts.let_through(lambda: signal.signal(signal.SIGUSR1, chained))
        assert send()
        signal.signal(signal.SIGUSR1, old[0])
        seen.clear()
        signal.raise_signal(signal.SIGUSR1)
        assert seen == ["first"]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_handler_set_in_a_closure_is_held_from_then_on():
    before = signal.getsignal(signal.SIGUSR1)
    try:
        with Interrupts() as interrupts:
            interrupts.let_through(lambda: signal.signal(signal.SIGUSR1, raise_stopped))
            signal.raise_signal(signal.SIGUSR1)
            with pytest.raises(Stopped):
                interrupts.open()
        assert signal.getsignal(signal.SIGUSR1) is raise_stopped
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_no_signal_is_lost_behind_one_that_raises():
    """And none waits longer than for the handler that runs."""
    seen = []

    def second(number, frame):
        assert frame is not None
        seen.append(number)

    def first(*_):
        signal.raise_signal(signal.SIGUSR2)
        seen.append(signal.SIGUSR1)

    before = [(s, signal.getsignal(s)) for s in (signal.SIGUSR1, signal.SIGUSR2)]
    try:
        signal.signal(signal.SIGUSR1, raise_stopped)
        signal.signal(signal.SIGUSR2, second)
        with pytest.raises(Stopped), Interrupts():  # noqa: PT012
            signal.raise_signal(signal.SIGUSR1)
            signal.raise_signal(signal.SIGUSR2)
        assert seen == [signal.SIGUSR2]
        with pytest.raises(Stopped), Interrupts() as interrupts:
            interrupts.let_through(lambda: (signal.raise_signal(signal.SIGUSR2), signal.raise_signal(signal.SIGUSR1)))
        with pytest.raises(ValueError, match="bad"), Interrupts() as interrupts:  # noqa: PT012
            interrupts.open()
            with pytest.raises(Stopped):
                signal.raise_signal(signal.SIGUSR1)
            seen.clear()
            signal.raise_signal(signal.SIGUSR2)
            assert seen == [], "after one that raises, others wait"
            raise ValueError("bad")
        assert seen == [signal.SIGUSR2]
        seen.clear()
        signal.signal(signal.SIGUSR1, first)
        with Interrupts() as interrupts:
            interrupts.let_through(lambda: (signal.raise_signal(signal.SIGUSR1), seen.append("closure")))
        assert seen == [signal.SIGUSR1, signal.SIGUSR2, "closure"]
    finally:
        for s, handler in before:
            signal.signal(s, handler)


def test_the_end_leaves_no_circle_of_references():
    held = weakref.ref(interrupts := Interrupts())
    with interrupts:
        pass
    del interrupts
    assert held() is None


def test_a_handler_runs_in_backward_at_once():
    """Backward is the user's time too: hooks of autograd, and all the minutes it may take."""
    model, order = mlp(), []
    before = signal.signal(signal.SIGUSR1, lambda *_: order.append("handler"))

    class Sends(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            signal.raise_signal(signal.SIGUSR1)
            order.append("backward")
            return g

    try:
        make(model.parameters(), method="sam").step(lambda: Sends.apply(regression(model, *batch())()))
        assert order == ["handler", "backward"] * 2
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_step_in_another_thread_leaves_signals_alone():
    """Only the main thread may set handlers, and handlers only run there."""
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    model, errors, seen = mlp(), [], []
    installed = signal.getsignal(signal.SIGUSR1)

    def closure():
        seen.append(signal.getsignal(signal.SIGUSR1) is installed)
        return regression(model, *batch())()

    def train():
        try:
            make(model.parameters()).step(closure)
        except BaseException as error:
            errors.append(error)

    try:
        thread = threading.Thread(target=train)
        thread.start()
        thread.join()
        assert not errors
        assert seen == [True] * 4
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("method", METHODS)
def test_a_closure_that_steps_its_own_optimizer_is_an_error(method):
    model = mlp()
    optimizer = make(model.parameters(), method=method, lr=0.0)
    loss = regression(model, *batch())
    start, calls = weights(optimizer), []

    def closure():
        calls.append(1)
        if len(calls) == 2:
            optimizer.step(loss)
        return loss()

    with pytest.raises(RuntimeError, match="inside its own closure"):
        optimizer.step(closure)
    same(weights(optimizer), start)
    optimizer.step(loss)


def test_two_threads_that_step_one_optimizer():
    model = mlp()
    optimizer = make(model.parameters(), lr=0.0)
    loss = regression(model, *batch())
    start, inside, go, errors = weights(optimizer), threading.Event(), threading.Event(), []

    def waits():
        inside.set()
        go.wait(10)
        return loss()

    def other():
        inside.wait(10)
        try:
            optimizer.step(loss)
        except RuntimeError as error:
            errors.append(str(error))
        go.set()

    thread = threading.Thread(target=other)
    thread.start()
    optimizer.step(waits)
    thread.join()
    assert len(errors) == 1
    assert "another thread" in errors[0]
    same(weights(optimizer), start)


def test_two_optimizers_nested_and_in_two_threads():
    def alone(seed):
        model = mlp(seed=seed)
        optimizer = make(model.parameters())
        for _ in range(3):
            optimizer.step(regression(model, *batch()))
        return weights(optimizer)

    expected = alone(0), alone(1)
    models = mlp(seed=0), mlp(seed=1)
    outer, inner = (make(m.parameters()) for m in models)
    for _ in range(3):
        calls = []

        def closure(calls=calls):
            if not calls:
                inner.step(regression(models[1], *batch()))
            calls.append(1)
            return regression(models[0], *batch())()

        outer.step(closure)
    same([weights(outer), weights(inner)], list(expected))

    models = mlp(seed=0), mlp(seed=1)
    optimizers = [make(m.parameters()) for m in models]

    def train(i):
        for _ in range(3):
            optimizers[i].step(regression(models[i], *batch()))

    threads = [threading.Thread(target=train, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    same([weights(o) for o in optimizers], list(expected))


def test_a_step_in_inference_mode_is_refused_and_spoils_nothing():
    model = mlp()
    optimizer = make(model.parameters())
    loss = regression(model, *batch())
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        optimizer.step(loss)
    before = weights(optimizer)
    optimizer.step(loss)
    assert not torch.equal(weights(optimizer)[0], before[0])


def test_a_signal_during_a_load_waits_for_its_end():
    """Between the base optimizer's state and GAM's own entries, a handler that raises would leave one without the other."""
    model = mlp()
    optimizer, closure = trainer("sam", model, regression(model, *batch()))
    optimizer.step(closure)
    saved = copy.deepcopy(optimizer.state_dict())
    original, told = optimizer.base_optimizer.load_state_dict, []

    def interrupted(state_dict):
        original(state_dict)
        signal.raise_signal(signal.SIGINT)
        told.append("the load went on")

    optimizer.base_optimizer.load_state_dict = interrupted
    with pytest.raises(KeyboardInterrupt):
        optimizer.load_state_dict(saved)
    assert told
    optimizer.base_optimizer.load_state_dict = original
    same(freeze(optimizer.state_dict()), freeze(saved))
