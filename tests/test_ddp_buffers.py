"""Buffers under DDP where the optimizer averages over ranks itself: every pass starts from those of rank 0."""

from __future__ import annotations

import copy
from unittest.mock import patch

import pytest
import torch
from gam_helpers import PASSES, batch, make, regression
from ranks import agree, run
from torch import nn
from torch.nn.parallel import DistributedDataParallel

pytestmark = pytest.mark.processes
MANY = 2**40  # more than a float32 counts
CASES = [("local", "finite_difference"), ("local", "exact"), ("global", "exact")]


class Reads(nn.Module):
    """Its output depends on a buffer that every forward moves, by the data of the rank."""

    def __init__(self, seen: list[float]):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.seen = nn.Linear(3, 2), seen
        self.register_buffer("mean", torch.zeros(1))
        self.register_buffer("count", torch.tensor(MANY))
        self.register_buffer("own", torch.zeros(1))

    def forward(self, x):
        self.seen.append(self.mean.item())
        with torch.no_grad():
            self.mean.lerp_(x.mean(), 0.5)
            self.count.add_(1)
            self.own.add_(x.sum())
        return self.linear(x) * (1 + self.mean)


def training(rank, mode, method, base=torch.optim.SGD, **options):
    seen: list[float] = []
    net = Reads(seen)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(net, ["own"])
    model = DistributedDataParallel(net, **options)
    optimizer = make(model.parameters(), base, method, model=model, perturb_sync=mode)
    return model, optimizer, regression(model, *batch(seed=rank + 1)), seen


def _every_pass(rank, mode, method):
    model, optimizer, loss_fn, seen = training(rank, mode, method)
    for step in range(3):
        seen.clear()
        before = model.module.mean.item()
        optimizer.step(loss_fn)
        assert len(seen) == PASSES[method] == seen.count(seen[0])
        assert agree(seen)
        assert rank or seen[0] == before
        assert (rank == 1 and step > 0) == (seen[0] != before)
        assert not agree(model.module.mean.item())  # as after one pass of DDP
        assert not agree(model.module.own.item())
    assert model.module.count.item() == MANY + 3
    torch.testing.assert_close(model.module.own, 3 * batch(seed=rank + 1)[0].sum().reshape(1))
    model(batch()[0])
    assert seen[-1] != model.module.mean.item()
    assert agree(seen[-1])  # DDP does it itself in its next forward


@pytest.mark.parametrize(("mode", "method"), CASES)
def test_every_pass_starts_from_the_buffers_of_rank_0(mode, method):
    run(2, _every_pass, mode, method)


def _of_each_rank(rank, mode, method):
    model, optimizer, loss_fn, seen = training(rank, mode, method, broadcast_buffers=False)
    optimizer.step(loss_fn)
    before = model.module.mean.item()
    seen.clear()
    optimizer.step(loss_fn)
    assert seen == [before] * PASSES[method]
    assert not agree(before)


@pytest.mark.parametrize(("mode", "method"), CASES)
def test_each_rank_keeps_its_buffers_where_ddp_shall_not_broadcast(mode, method):
    run(2, _of_each_rank, mode, method)


def _after_a_failure(rank, between):
    """Local mode. What a rank that failed has received it uses again, unless its buffers have been set anew."""
    model, optimizer, loss_fn, seen = training(rank, "local", "sam")
    optimizer.step(loss_fn)
    kept = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    before = model.module.mean.item()

    def fails():
        loss_fn()
        raise ValueError("bad batch")

    for _ in range(2):
        if rank or between == "load buffers":
            with pytest.raises(ValueError, match="bad batch"):
                optimizer.step(fails)
            assert model.module.mean.item() == before
            if between == "load the optimizer":
                optimizer.load_state_dict(kept[1])
            if between == "load buffers":
                model.load_state_dict(kept[0])
    seen.clear()
    optimizer.step(loss_fn)
    assert seen == [seen[0]] * 2
    assert agree(seen[0]) == (between != "load buffers")
    assert seen[0] == before or (rank and between != "load buffers")
    optimizer.step(loss_fn)
    assert agree(seen[-2:])


@pytest.mark.parametrize("between", ["", "load the optimizer", "load buffers"])
def test_a_rank_that_steps_again_does_not_broadcast_again(between):
    run(2, _after_a_failure, between)


def _after_an_update_that_failed(rank, mode, method):
    """All passes had been made: buffers have moved, and those of rank 0 are what the next step starts from."""
    model, optimizer, loss_fn, seen = training(rank, mode, method, torch.optim.NAdam)
    with patch.object(optimizer.base_optimizer, "step", side_effect=MemoryError), pytest.raises(MemoryError):
        optimizer.step(loss_fn)
    before = model.module.mean.item()
    seen.clear()
    optimizer.step(loss_fn)
    assert agree(seen)
    assert (rank == 0) == (seen[0] == before)


@pytest.mark.parametrize(("mode", "method"), CASES)
def test_after_an_update_that_failed_on_all_ranks_buffers_are_broadcast_anew(mode, method):
    run(2, _after_an_update_that_failed, mode, method)
