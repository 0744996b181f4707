"""Parameters that have a gradient on some ranks only, and in some steps only, where the optimizer averages itself."""

from __future__ import annotations

import pytest
import torch
from gam_helpers import METHODS, batch, make
from ranks import agree, fingerprint, run, shard_of
from torch import nn
from torch.nn.parallel import DistributedDataParallel

pytestmark = pytest.mark.processes

LOCAL = [m for m in METHODS if m != "exact"]
TURNS = [(False, False), (True, False), (True, True), (False, True), (False, False), (False, True)]  # who uses the branch


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.always, self.sometimes, self.uses = nn.Linear(3, 2), nn.Linear(3, 2), False

    def forward(self, x):
        return self.always(x) + self.sometimes(x) if self.uses else self.always(x)


def _take_turns(rank, cases):
    x, y = shard_of(rank, *batch())
    for method, mode in cases:
        model = DistributedDataParallel(Branch(), find_unused_parameters=True)
        optimizer = make(model.parameters(), method=method, model=model, perturb_sync=mode, momentum=0.0)
        for turn in TURNS:
            model.module.uses = turn[rank]
            before = fingerprint(model.module.sometimes.parameters())
            optimizer.step(lambda model=model: (model(x) - y).square().mean())
            assert agree(fingerprint(model.parameters())), (method, mode, turn)
            moved = fingerprint(model.module.sometimes.parameters()) != before
            assert moved == any(turn), (method, mode, turn)


@pytest.mark.parametrize("cases", [[(m, "local") for m in LOCAL], [("exact", "global")]], ids=["local", "exact"])
def test_they_move_on_all_ranks_as_soon_as_one_has_a_gradient(cases):
    run(2, _take_turns, cases)
