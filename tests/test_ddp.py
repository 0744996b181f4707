"""DistributedDataParallel on two real processes: replicas stay equal, and equal what one process computes."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from float64_gam import Gam64
from gam_helpers import METHODS, SETTINGS, batch, bits, close, closure_of, functional_loss, make, mlp, regression, same
from ranks import agree, fingerprint, run, shard_of
from torch import nn
from torch.nn.parallel import DistributedDataParallel

MODES = ("global", "local")
BASES = {
    "sgd": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01}),
    "foreign": (torch.optim.NAdam, {"lr": 0.01}),
}


class Heads(nn.Module):
    """A network of which each rank uses one head: the other has no gradient there; `unused` has none anywhere."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.2))
        self.heads = nn.ModuleList([nn.Linear(6, 2), nn.Linear(6, 2)])
        self.common, self.unused = nn.Linear(6, 2), nn.Linear(6, 2)
        self.to(dtype)

    def forward(self, x, head):
        body = self.body(x)
        return self.heads[head](body) + self.common(body)


def build(model, mode, method="finite_difference", base="sgd", ddp=None, **options):
    wrapped = DistributedDataParallel(model, **(ddp or {}))
    kind, base_options = BASES[base]
    options = {"model": wrapped, **base_options, **options}
    return wrapped, make(wrapped.parameters(), kind, method, perturb_sync=mode, **options)


# -- replicas stay equal ----------------------------------------------------------------------------------------------


def _long_run(rank, mode, views):
    results = {}
    for method in METHODS:
        model, optimizer = build(Heads(), mode, method, ddp={"gradient_as_bucket_view": views, "find_unused_parameters": True})
        unused = bits(model.module.unused.weight)
        start = fingerprint(model.parameters())
        torch.manual_seed(100 + rank)  # other dropout masks, other batches
        for _ in range(300 if method == "finite_difference" else 30):
            x, y = torch.randn(8, 3), torch.randn(8, 2)
            optimizer.step(closure_of(optimizer, lambda x=x, y=y: (model(x, rank) - y).square().mean()))
        assert agree(fingerprint(model.parameters())), (method, "weights differ between ranks")
        state = optimizer.state_dict()["state"]
        assert agree(fingerprint(t for entry in state.values() for t in entry.values())), (method, "state differs")
        assert agree(list(state)), method
        assert fingerprint(model.parameters()) != start
        same(bits(model.module.unused.weight), unused)
        assert all(torch.isfinite(p).all() for p in model.parameters())
        results[method] = len(state)
    return results


@pytest.mark.parametrize(("mode", "views"), list(itertools.product(MODES, [False, True])))
def test_replicas_stay_bit_identical(mode, views):
    for result in run(2, _long_run, mode, views):
        assert result == dict.fromkeys(METHODS, 10)  # all parameters but the two of `unused` have state


# -- what is computed -------------------------------------------------------------------------------------------------


def _full_batch(rank, backend):
    """Global mode on half batches against one process on the whole batch; every method, base and option that has norms."""
    x, y = batch(dtype=torch.float64)
    half = shard_of(rank, x, y)
    cases = [(m, base, {}) for m in METHODS for base in BASES]
    cases += [(m, "sgd", {"max_grad_norm": 0.05}) for m in METHODS] + [("accelerated", "sgd", {"adaptive": True})]
    cases += [("exact", "sgd", {"oracle": "sam", "sam_rho": 0.3}), ("finite_difference", "sgd", {"interval": 2})]
    cases += [("exact", "sgd", {"interval": 2})]
    for method, base, options in cases:
        alone = mlp(torch.float64)
        kind, base_options = BASES[base]
        reference = make(alone.parameters(), kind, method, backend=backend, **base_options, **options)
        model, optimizer = build(mlp(torch.float64), "auto", method, base, backend=backend, **options)
        for _ in range(3):
            reference.step(closure_of(reference, regression(alone, x, y)))
            optimizer.step(closure_of(optimizer, regression(model, *half)))
        close(list(model.parameters()), list(alone.parameters()), 1e-9, f"{method} {base} {options}: weights")
        ours, theirs = optimizer.diagnostics(), reference.diagnostics()
        for key in set(theirs) - {"loss", "sharpness"}:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-6, atol=1e-9, msg=f"{method} {base} {options}: {key}")


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_global_mode_equals_one_process_on_the_whole_batch(backend):
    run(2, _full_batch, backend)


def _local_against_float64(rank, backend):
    """Each rank's own d, by the float64 judge on that rank's half, averaged; then the base's update, everywhere."""
    x, y = batch(dtype=torch.float64)
    halves = [(x[r::2], y[r::2]) for r in range(2)]
    for method, base, options in [
        *((m, b, {}) for m in METHODS for b in BASES),
        *((m, "sgd", {"max_grad_norm": 0.05}) for m in METHODS),
        ("accelerated", "adamw", {"adaptive": True}),
        ("finite_difference", "sgd", {"oracle": "sam"}),
    ]:
        model, optimizer = build(mlp(torch.float64), "local", method, base, backend=backend, **options)
        twin = mlp(torch.float64)
        kind, base_options = BASES[base]
        plain = kind(twin.parameters(), **base_options)
        settings = {k: v for k, v in (SETTINGS[method] | options).items() if k not in ("rho", "max_grad_norm")}
        for _ in range(3):
            optimizer.step(closure_of(optimizer, regression(model, *halves[rank])))
            directions = []
            for half in halves:
                judge = Gam64([{"params": list(twin.parameters()), "rho": SETTINGS[method]["rho"]}], method=method, **settings)
                directions.append(judge.direction(functional_loss(twin, *half)))
            for p, *ds in zip(twin.parameters(), *directions, strict=True):
                p.grad = (ds[0] + ds[1]) / 2
            norm = nn.utils.clip_grad_norm_(twin.parameters(), options.get("max_grad_norm", float("inf")))
            expected = min(norm.item(), options.get("max_grad_norm", float("inf")))
            torch.testing.assert_close(optimizer.diagnostics()["direction_norm"].item(), expected, rtol=1e-4, atol=1e-9)
            plain.step()
        close(list(model.parameters()), list(twin.parameters()), 1e-8, f"{method} {base} {options}: weights")


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_local_mode_averages_each_ranks_own_direction(backend):
    run(2, _local_against_float64, backend)
