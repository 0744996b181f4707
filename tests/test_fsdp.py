"""Sharded parameters (FSDP2, HSDP, tensor parallelism) on real processes: the same steps as one process makes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from gam_helpers import batch, bits, close, closure_of, make, same
from ranks import agree, fingerprint, run, shard_of
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

METHODS = ("sam", "finite_difference", "accelerated")
BASES = {
    "sgd": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "amsgrad": True}),
    "foreign": (torch.optim.NAdam, {"lr": 0.01}),
}


def net(dtype=torch.float64, seed=0):
    """Rows that do not divide evenly: 7, 5 and 1; over three ranks one of them has no row of the last layer."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 1)).to(dtype)


def shard(model, **options):
    for layer in (model[0], model[2]):
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def loss_of(model, x, y):
    return lambda: (model(x) - y).square().mean()


def full(params):
    return [p.detach().full_tensor() if isinstance(p, DTensor) else p.detach() for p in params]


def compare(optimizer, model, reference, alone, mine, whole, tolerance=1e-9, steps=3, what=""):
    """Steps of both optimizers; then weights, diagnostics and state must agree."""
    for _ in range(steps):
        reference.step(closure_of(reference, loss_of(alone, *whole)))
        optimizer.step(closure_of(optimizer, loss_of(model, *mine)))
    close(full(model.parameters()), list(alone.parameters()), tolerance, f"{what}: weights")
    ours, theirs = optimizer.diagnostics(), reference.diagnostics()
    assert set(ours) == set(theirs)
    for key in set(theirs) - {"loss", "sharpness", "noise_ratio"}:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e4 * tolerance, atol=tolerance, msg=f"{what}: {key}")


# -- FSDP2 ------------------------------------------------------------------------------------------------------------


def _unsharded_twin(rank, backend, policy):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    options = {"offload_policy": CPUOffloadPolicy(pin_memory=False)} if policy == "cpu_offload" else {}
    x, y = batch(n=12, outputs=1, dtype=torch.float64)
    mine = shard_of(rank, x, y)
    cases = [(m, base, {}) for m in METHODS for base in BASES]
    cases += [(m, "sgd", {"max_grad_norm": 0.05}) for m in METHODS] + [("accelerated", "adamw", {"adaptive": True})]
    cases += [("finite_difference", "sgd", o) for o in ({"interval": 2}, {"oracle": "sam"}, {"oracle": "sam", "sam_rho": 0.3})]
    for method, base, extra in cases:
        kind, base_options = BASES[base]
        alone, model = net(), shard(net(), mesh=mesh, **options)
        groups = [[{"params": list(m[0].parameters()), "rho": 0.2}, {"params": list(m[2].parameters()), "perturb": False},
                   {"params": list(m[4].parameters())}] for m in (alone, model)]  # fmt: skip
        reference = make(groups[0], kind, method, backend=backend, **base_options, **extra)
        optimizer = make(groups[1], kind, method, backend=backend, model=model, **base_options, **extra)
        compare(optimizer, model, reference, alone, mine, (x, y), what=f"{method} {base} {extra}")
        for p, entry in optimizer.state.items():
            for key, value in entry.items():
                if key != "step" and value.dim():
                    assert isinstance(value, DTensor), (base, key)
                    assert value.placements == p.placements
                    assert value.shape == p.shape


@pytest.mark.parametrize(
    ("world", "backend", "policy"),
    [(2, "auto", ""), (2, "torch", ""), (3, "auto", ""), (2, "auto", "cpu_offload")],
    ids=["two", "two_torch", "three", "cpu_offload"],
)
def test_fsdp_equals_one_process(world, backend, policy):
    run(world, _unsharded_twin, backend, policy)


def _mixed_precision(rank):
    """Weights all-gathered in bf16: both runs see the same rounded weights, so they agree to the noise of bf16."""
    mesh = init_device_mesh("cpu", (2,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    x, y = batch(n=64, outputs=1)
    for method in METHODS:
        model = shard(net(torch.float32), mesh=mesh, mp_policy=policy)
        optimizer = make(model.parameters(), method=method, model=model, lr=0.05)
        closure = closure_of(optimizer, loss_of(model, *shard_of(rank, x, y)))
        losses = [optimizer.step(closure).item() for _ in range(40)]
        assert sum(losses[-5:]) < 0.9 * sum(losses[:5]), losses
        assert all(p.dtype == torch.float32 for p in model.parameters())
        assert int(optimizer.skipped_steps) == 0
        for key in ("gradient_norm", "direction_norm", "perturbation_0"):
            assert agree(optimizer.diagnostics()[key].item()), key


def test_mixed_precision_policy_trains():
    run(2, _mixed_precision)
