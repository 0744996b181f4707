"""What a captured step does around its graph, as far as a CPU can tell: when it captures anew, what it uploads before."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from gam_helpers import METHODS as NAMES
from gam_helpers import batch, make, mixed_net, mlp, same, snapshot
from torch.optim import SGD, AdamW

from gam_fused.constants import Column
from gam_fused.graphs import capture, capture_step
from gam_fused.graphs.capture import CapturedStep
from gam_fused.graphs.recording import Recording
from gam_fused.methods import METHODS, plain

FIRST_ORDER = [m for m in NAMES if m != "exact"]


class Graph:
    """Stands for a CUDA graph: a replay notes the coefficients that kernels would read."""

    def __init__(self, optimizer):
        self.optimizer, self.seen = optimizer, []

    def replay(self):
        (device,) = self.optimizer.session.plan.devices.values()
        self.seen.append(device.tables["method"].clone())


@pytest.fixture
def captured(monkeypatch):
    """A step that says it has been captured, on the CPU; `captures` counts how often it did so again."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(capture, "_check_optimizer", lambda optimizer: torch.device("cpu"))

    def fake(self):
        self.captures = getattr(self, "captures", -1) + 1
        settings, session = self.optimizer.prepare(), self.optimizer.session
        if not hasattr(self, "_step"):
            self.optimizer.step(lambda inputs: self.loss_fn(*inputs), tuple(self.inputs))  # makes the optimizer state
            self._step = SimpleNamespace(record=session.last, loss=torch.zeros(()))
        self._graph = Graph(self.optimizer)
        recording, method = Recording(self._graph, self._step, None, None), METHODS[settings.method]
        self._graphs = dict.fromkeys((method.passes, plain.passes), recording)
        self._plan, self._made_for = session.plan, self._decides(settings)

    monkeypatch.setattr(CapturedStep, "_capture", fake)
    model = mlp()
    optimizer = make(model.parameters(), model=model, momentum=0.0)
    return CapturedStep(optimizer, lambda x: model(x).square().mean(), batch()[:1], 2, None)


@pytest.mark.parametrize("name", ["lr", "rho", "rho_prime", "alpha"])
def test_numbers_that_change_are_on_the_device_before_a_replay(captured, name):
    optimizer, (x, _) = captured.optimizer, batch()
    captured(x)
    if name in ("lr", "rho"):
        optimizer.param_groups[0][name] *= 0.5
    else:
        setattr(optimizer, name, getattr(optimizer, name) * 0.5)
    captured(x)
    before, after = captured._graph.seen
    changed = {
        "lr": Column.LR, "rho": Column.RADIUS_1, "rho_prime": Column.RADIUS_0, "alpha": Column.DIRECTION_LAST
    }[name]  # fmt: skip
    assert after[0, changed] == before[0, changed] * 0.5
    assert captured.captures == 0


def test_inputs_are_copied_into_the_graphs_own(captured):
    x = torch.full_like(captured.inputs[0], 3.0)
    own = captured.inputs[0]
    captured(x)
    assert own is captured.inputs[0]
    assert torch.equal(own, x)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("method", "gradient_penalty"),
        ("adaptive", True),
        ("oracle", "sam"),
        ("max_grad_norm", 1.0),
        ("max_ratio", 0.5),
        ("flatness_fraction", 0.5),
        ("interval", 2),
        ("preserve_rng_state", False),
    ],
)
def test_a_setting_that_changes_the_passes_captures_anew(captured, name, value):
    captured(batch()[0])
    setattr(captured.optimizer, name, value)
    captured(batch()[0])
    assert captured.captures == 1
    captured(batch()[0])
    assert captured.captures == 1


@pytest.mark.parametrize("name", ["max_grad_norm", "max_ratio"])
def test_a_threshold_that_changes_is_a_number(captured, name):
    setattr(captured.optimizer, name, 1.0)
    captured(batch()[0])
    assert captured.captures == 1
    setattr(captured.optimizer, name, 2.0)
    captured(batch()[0])
    assert captured.captures == 1


def test_an_oracle_that_needs_a_pass_of_its_own_captures_anew(captured):
    captured.optimizer.oracle = "sam"
    captured(batch()[0])
    captured.optimizer.sam_rho = captured.optimizer.rho_prime
    captured(batch()[0])
    assert captured.captures == 1, "at the length of the probe it is the same pass"
    captured.optimizer.sam_rho = 2 * captured.optimizer.rho_prime
    captured(batch()[0])
    assert captured.captures == 2


def test_other_state_captures_anew(captured):
    optimizer = captured.optimizer
    captured(batch()[0])
    optimizer.load_state_dict(optimizer.state_dict())
    captured(batch()[0])
    assert captured.captures == 1


def test_other_modules_capture_anew(captured):
    session = captured.optimizer.session
    captured(batch()[0])
    assert captured.captures == 0
    session.modules = [*session.modules, torch.nn.BatchNorm1d(2)]
    captured(batch()[0])
    assert captured.captures == 1


def test_diagnostics_tell_of_the_replayed_step(captured):
    captured(batch()[0])
    captured.optimizer.rho_prime = 0.5
    captured.optimizer.param_groups[0]["rho"] = 0.75
    captured(batch()[0])
    assert captured.optimizer.session.last.rho == 0.75
    assert captured.optimizer.session.last.settings.rho_prime == 0.5
    assert captured.optimizer.session.steps_taken == 3


class Rehearsal:
    """Stands for a CUDA graph: a replay makes the step that was captured once more, into the same tensors."""

    def __init__(self, take):
        self.take, self.step = take, take(None)
        self.replays = 0

    def pool(self):
        return "pool"

    def replay(self):
        self.replays += 1
        again = self.take(None)
        self.step.loss.copy_(again.loss)


@pytest.fixture
def rehearsed(monkeypatch):
    """Captures are made and replayed on the CPU. Gives the recordings with their pools, in order."""
    for name in ("Stream", "stream", "current_stream", "device"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(capture, "_check_optimizer", lambda optimizer: torch.device("cpu"))
    made = []

    def record(take, settings, device, stream, pool):
        graph = Rehearsal(take)
        made.append((graph, pool))
        return Recording(graph, graph.step, None, None)

    monkeypatch.setattr(capture, "record", record)
    return made


def train(captured, interval, method="finite_difference", base=SGD, steps=6, oracle="loss"):
    model = mixed_net()
    options = {"oracle": oracle} if oracle == "sam" else {}
    optimizer = make(model.parameters(), base, method, model=model, interval=interval, **options)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
    x, y = batch()
    loss = lambda x, y: (model(x) - y).square().mean()  # noqa: E731
    torch.manual_seed(3)
    step = capture_step(optimizer, loss, (x, y)) if captured else lambda *b: optimizer.step(lambda: loss(*b))
    torch.manual_seed(3)
    losses = []
    for i in range(steps):
        losses.append(step(x + i, y))  # later steps do not overwrite it
        schedule.step()
    return losses, snapshot(optimizer, model), optimizer, step


@pytest.mark.parametrize("base", [SGD, AdamW], ids=lambda b: b.__name__)
@pytest.mark.parametrize("method", FIRST_ORDER)
@pytest.mark.parametrize("interval", [1, 2, 3])
def test_a_graph_for_each_kind_of_step(rehearsed, interval, method, base):
    """With an interval, the steps between are plain ones; by the count of steps, as in eager steps."""
    losses, after, optimizer, _ = train(True, interval, method, base)
    eager_losses, eager_after, *_ = train(False, interval, method, base)
    same(losses, eager_losses)
    same(after, eager_after)
    assert optimizer.session.steps_taken == 6
    replays = [6] if interval == 1 else [6 // interval, 6 - 6 // interval]
    assert [graph.replays for graph, _ in rehearsed] == replays
    assert [pool for _, pool in rehearsed] == [None, "pool"][: len(replays)]


def test_steps_between_with_an_oracle(rehearsed):
    losses, after, *_ = train(True, 2, oracle="sam")
    eager_losses, eager_after, *_ = train(False, 2, oracle="sam")
    same(losses, eager_losses)
    same(after, eager_after)


def test_an_interval_that_changes_is_a_number(rehearsed):
    _, _, optimizer, step = train(True, 2, steps=1)
    optimizer.interval = 4
    for _ in range(4):
        step(*batch())
    assert [graph.replays for graph, _ in rehearsed] == [2, 3]


def test_diagnostics_of_a_step_between(rehearsed):
    _, _, optimizer, _ = train(True, 3, steps=2)
    assert "gradient_norm" in optimizer.diagnostics()
    assert "perturbation_0" not in optimizer.diagnostics()


def test_a_checkpoint_is_no_reason_to_capture_anew(rehearsed):
    _, _, optimizer, step = train(True, 1, steps=1)
    optimizer.state_dict()
    step(*batch())
    assert [graph.replays for graph, _ in rehearsed] == [2]


def test_after_a_capture_that_failed_the_next_call_captures(rehearsed, monkeypatch):
    _, _, optimizer, step = train(True, 1, steps=1)
    before, works = snapshot(optimizer), capture.record
    monkeypatch.setattr(capture, "record", lambda *a: 1 / 0)
    optimizer.adaptive = True
    with pytest.raises(ZeroDivisionError):
        step(*batch())
    same(snapshot(optimizer), before)
    monkeypatch.setattr(capture, "record", works)
    optimizer.adaptive = False
    step(*batch())
    assert [graph.replays for graph, _ in rehearsed] == [1, 1]


def test_a_pool_that_was_given_serves_all_graphs(rehearsed):
    model, (x, _) = mlp(), batch()
    optimizer = make(model.parameters(), model=model, interval=2)
    capture_step(optimizer, lambda x: model(x).square().mean(), (x,), pool="given")
    assert [pool for _, pool in rehearsed] == ["given", "given"]


def test_a_warmup_of_each_kind_of_step(rehearsed):
    model, calls, (x, _) = mlp(), [], batch()

    def loss_fn(x):
        calls.append(x)
        return model(x).square().mean()

    optimizer = make(model.parameters(), model=model, interval=2)
    capture_step(optimizer, loss_fn, (x,), warmup=5)
    assert len(calls) == (5 + 1) * (4 + 1), "and once more of each, captured"


def test_the_base_counts_as_stepped_for_schedulers(rehearsed):
    """Otherwise they warn that they are called too early."""
    model, (x, _) = mlp(), batch()
    optimizer = make(model.parameters(), model=model)
    step = capture_step(optimizer, lambda x: model(x).square().mean(), (x,))
    optimizer._opt_called = False
    step(x)
    assert optimizer._opt_called


def test_what_no_graph_can_hold_is_refused_in_every_call(rehearsed, monkeypatch):
    _, _, optimizer, step = train(True, 1, steps=1)
    monkeypatch.undo()
    optimizer.generators = (torch.Generator(),)
    with pytest.raises(ValueError, match="generators= cannot be used"):
        step(*batch())


def test_another_base_optimizer_captures_anew(captured):
    captured(batch()[0])
    made_for = captured._decides(captured.optimizer.settings)
    captured.optimizer.session.base = copy.copy(captured.optimizer.session.base)
    assert captured._decides(captured.optimizer.settings) != made_for


def test_parameters_of_another_optimizer_are_refused_by_name(rehearsed):
    """A graph's gradients lie in its own memory: no other optimizer could rely on them."""
    model = mlp()
    optimizer = make(model[0].parameters(), model=model)
    optimizer.prepare()
    with pytest.raises(ValueError, match=r"another optimizer: 2\.weight \(shape \(2, 5\)\)"):
        capture.check_others(optimizer.session)
    with pytest.raises(ValueError, match="another optimizer"):
        capture_step(optimizer, lambda x: model(x).square().mean(), batch()[:1])
    model[2].requires_grad_(False)
    capture.check_others(optimizer.session)
