"""What a captured step does around its graph, as far as a CPU can tell: when it captures anew, what it uploads before."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from gam_helpers import batch, make, mlp

from gam_fused.constants import Column
from gam_fused.graphs import capture
from gam_fused.graphs.capture import CapturedStep


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
        self._random, self._graph = None, Graph(self.optimizer)
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


def test_other_parameters_state_or_modules_capture_anew(captured):
    optimizer = captured.optimizer
    captured(batch()[0])
    optimizer.load_state_dict(optimizer.state_dict())
    captured(batch()[0])
    assert captured.captures == 1
    optimizer.session.modules = [*optimizer.session.modules, torch.nn.BatchNorm1d(2)]
    captured(batch()[0])
    assert captured.captures == 2


def test_diagnostics_tell_of_the_replayed_step(captured):
    captured(batch()[0])
    captured.optimizer.rho_prime = 0.5
    captured.optimizer.param_groups[0]["rho"] = 0.75
    captured(batch()[0])
    assert captured.optimizer.session.last.rho == 0.75
    assert captured.optimizer.session.last.settings.rho_prime == 0.5
    assert captured.optimizer.session.steps_taken == 3
