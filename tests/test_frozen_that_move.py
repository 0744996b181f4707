"""Frozen parameters that a forward moves: those too large to be copied in advance, those that came or went between steps."""

from __future__ import annotations

import pytest
import torch
from gam_helpers import batch
from torch import nn

from gam_fused import FusedGAM
from gam_fused.transaction import model_state


def in_place(p):
    p.mul_(0.5)


def other_memory(p):
    p.data = p.detach() * 0.5


def through_data(p):
    p.data.mul_(0.5)


class Halves(nn.Module):
    """Every forward halves a frozen parameter, from its call number `start` on, and notes what it read."""

    def __init__(self, write, start: int = 1):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k = nn.Linear(6, 6), nn.Parameter(torch.ones(6), requires_grad=False)
        self.write, self.start, self.seen, self.left = write, start, [], []

    def forward(self, x):
        self.seen.append(float(self.k[0]))
        if self.start <= 1:
            with torch.no_grad():
                self.write(self.k)
        self.left.append(self.k.data_ptr())
        return self.q(x) * self.k


def stepped(model, optimizer):
    """What the passes of one step have read."""
    model.seen.clear()
    model.left.clear()
    x, _ = batch(features=(6,))
    optimizer.step(lambda: model(x).square().mean())
    return list(model.seen)


def trainer(model):
    return FusedGAM(model.q.parameters(), torch.optim.SGD, lr=0.1, model=model)


@pytest.fixture
def nothing_is_affordable(monkeypatch):
    monkeypatch.setattr(model_state, "_COPIED_TO_LEARN", 0)
    monkeypatch.setattr(model_state, "_TIMES_TRAINED", 0)


@pytest.mark.parametrize("write", [in_place, other_memory], ids=lambda f: f.__name__)
def test_large_ones_are_copied_once_they_have_moved(nothing_is_affordable, write):
    model = Halves(write)
    optimizer = trainer(model)
    for i in range(4):
        seen = stepped(model, optimizer)
        assert torch.equal(model.k, torch.full((6,), 0.5 ** (i + 1)))
        assert model.k.data_ptr() == model.left[0], "the memory of the first pass"
        if i > 0 or write is other_memory:
            assert seen == [0.5**i] * 4


def test_one_that_rests_for_a_step_is_still_copied(nothing_is_affordable):
    """While another one begins to move."""
    first, second = Halves(in_place), Halves(in_place, start=2)
    model = nn.ModuleList([first, second])
    optimizer = FusedGAM([*first.q.parameters(), *second.q.parameters()], torch.optim.SGD, lr=0.1, model=model)
    x, _ = batch(features=(6,))
    for i in range(3):
        first.start, second.start = (2, 1) if i == 1 else (1, 2)
        first.seen.clear()
        optimizer.step(lambda: (first(x) + second(x)).square().mean())
    assert first.seen == [0.5] * 4
    assert torch.equal(first.k, torch.full((6,), 0.25))
    assert torch.equal(second.k, torch.full((6,), 0.5))


def test_large_ones_that_got_other_memory_between_steps(nothing_is_affordable):
    """A step that moves them once more goes back to that, not to where they were before."""
    model = Halves(other_memory, start=2)
    optimizer = trainer(model)
    stepped(model, optimizer)
    model.k.data, model.start = torch.full((6,), 3.0), 1
    assert stepped(model, optimizer) == [3.0] * 4
    assert torch.equal(model.k, torch.full((6,), 1.5))


@pytest.mark.parametrize("begins", range(8))
def test_untold_writes_are_learnt_of_in_each_of_the_first_steps(begins):
    model = Halves(through_data, start=2)
    optimizer = trainer(model)
    for i in range(begins + 3):
        model.start = 2 if i < begins else 1
        assert len(set(stepped(model, optimizer))) == 1
    assert torch.equal(model.k, torch.full((6,), 0.5**3))


def test_untold_writes_are_learnt_of_in_some_later_steps():
    """Step 16 is one of them."""
    model = Halves(through_data, start=2)
    optimizer = trainer(model)
    for i in range(18):
        model.start = 2 if i < 15 else 1
        assert len(set(stepped(model, optimizer))) == 1


@pytest.mark.parametrize("write", [in_place, through_data], ids=lambda f: f.__name__)
def test_one_that_takes_the_place_of_another_between_steps(write):
    model = Halves(write)
    optimizer = trainer(model)
    stepped(model, optimizer)
    model.k = nn.Parameter(torch.full((6,), 3.0), requires_grad=False)
    for i in range(3):
        assert stepped(model, optimizer) == [3 * 0.5**i] * 4
    assert torch.equal(model.k, torch.full((6,), 3 * 0.5**3))


@pytest.mark.parametrize("replaced", [False, True])
def test_in_a_step_whose_flag_the_host_has_not_read(nothing_is_affordable, replaced):
    """On a GPU. What the first pass has moved without a copy, or replaced, is decided on the host."""

    class Flag:
        """Stands for a tensor on a GPU."""

        device = torch.device("cuda")

        def to(self, device, dtype=None, non_blocking=False):
            return torch.tensor(0.0)

    model = nn.BatchNorm1d(3) if replaced else Halves(in_place).k
    holder = model if replaced else nn.Module()
    if not replaced:
        holder.k = model
    state = model_state.ModelState([holder]).begin()

    def forward(value):
        if replaced:
            holder.running_mean = torch.full((3,), value)
        else:
            holder.k.fill_(value)

    forward(2.0)
    state.first_pass_done()
    state.replay()
    forward(5.0)
    state.finish(Flag())
    t = holder.running_mean if replaced else holder.k
    assert torch.equal(t, torch.full_like(t, 2.0))
