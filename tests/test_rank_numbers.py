"""A gradient that is not finite on one rank only, in one element of one pass: all ranks skip the step, and count it."""

from __future__ import annotations

import pytest
import torch
from gam_helpers import same
from rank_faults import EVERY_PASS, WAYS, Fault, Training
from ranks import agree, fingerprint, full, run

from gam_fused.parallel.dtensor import local

pytestmark = pytest.mark.processes
NUMBERS = (float("inf"), float("nan"), float("-inf"))


def without_counts(now):
    """Of a skipped step counts and generators move, which are as after a step."""
    return {name: value for name, value in now.items() if name not in ("counters", "steps", "random")}


def _not_finite(rank, way):
    cases = [(method, k) for w, method, k in EVERY_PASS if w == way]
    for i, (method, k) in enumerate(cases):
        base = ("sgd", "adamw", "foreign")[i % 3]
        training = Training(way, method, base)
        training.step()
        before, fault = training.now(), Fault(k, "number", NUMBERS[i % 3])
        loss = training.step(fault if rank == (i + k) % 2 else None)
        assert torch.isfinite(loss)  # it is in the gradient alone
        same(without_counts(training.now()), without_counts(before), f"{method} {base} {fault}")
        training.step()
        assert fingerprint(training.weights()) != fingerprint(before["weights"]), (method, base, fault)
        assert all(local(p).isfinite().all() for p in training.model.parameters())
        assert training.optimizer.skipped_steps == 1, (method, base, fault)
        assert agree(training.optimizer.session.counters), (method, base, fault)
        assert agree(fingerprint(full(training.model.parameters()))), (method, base, fault)


@pytest.mark.parametrize("way", WAYS)
def test_a_number_on_one_rank_skips_the_step_on_all(way):
    run(2, _not_finite, way)
