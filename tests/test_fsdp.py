"""Sharded parameters (FSDP2, HSDP, tensor parallelism) on real processes: the same steps as one process makes."""

from __future__ import annotations

import itertools
import unittest.mock

import pytest
import torch
import torch.distributed as dist
from gam_helpers import batch, bits, close, closure_of, make, same
from ranks import agree, fingerprint, full, loss_of, net, run, shard, shard_of
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.func import functional_call

from gam_fused.integrations import BatchClosure
from gam_fused.parallel.dtensor import local

pytestmark = pytest.mark.processes
METHODS = ("sam", "finite_difference", "accelerated")
BASES = {
    "sgd": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "amsgrad": True}),
    "foreign": (torch.optim.NAdam, {"lr": 0.01}),
}


def on_batch(optimizer, model, batch):
    """The loss of a mini-batch, or of its first part; a rank's first samples are among the first of all ranks."""
    return BatchClosure(lambda part: closure_of(optimizer, loss_of(model, *part))(), batch)


def compare(optimizer, model, reference, alone, mine, whole, tolerance=1e-9, steps=3, what=""):
    """Steps of both optimizers; then weights, diagnostics and state must agree."""
    for _ in range(steps):
        reference.step(on_batch(reference, alone, whole))
        optimizer.step(on_batch(optimizer, model, mine))
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
    cases += [
        ("finite_difference", "sgd", o) for o in ({"interval": 2}, {"oracle": "sam"}, {"oracle": "sam", "sam_rho": 0.3})
    ]
    bounded = {"max_ratio": 0.3, "alpha": float("inf")}
    cases += [(m, "sgd", bounded) for m in ("finite_difference", "gradient_penalty")]
    if len(x) % dist.get_world_size() == 0 and dist.get_world_size() == 2:  # two halves of halves are half of the whole
        cases += [(m, "sgd", {"flatness_fraction": 0.5}) for m in (*METHODS, "gsam", "gradient_penalty")]
        cases += [("finite_difference", "adamw", {"flatness_fraction": 0.5, **bounded})]
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


def _in_bfloat16(model, x, y):
    """What FSDP's policy does, on one process: weights and inputs rounded to bf16, per half of the batch."""

    def loss_fn():
        weights = {name: p.bfloat16() for name, p in model.named_parameters()}
        halves = [(functional_call(model, weights, (x[r::2].bfloat16(),)) - y[r::2]).square().mean() for r in range(2)]
        return sum(halves) / 2

    return loss_fn


def _mixed_precision(rank):
    mesh = init_device_mesh("cpu", (2,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    x, y = batch(n=64, outputs=1)
    for method in METHODS:
        alone, model = net(torch.float32), shard(net(torch.float32), mesh=mesh, mp_policy=policy)
        reference = make(alone.parameters(), method=method, lr=0.05)
        optimizer = make(model.parameters(), method=method, model=model, lr=0.05)
        start = [p.detach().clone() for p in alone.parameters()]
        for _ in range(5):
            reference.step(closure_of(reference, _in_bfloat16(alone, x, y)))
            optimizer.step(closure_of(optimizer, loss_of(model, *shard_of(rank, x, y))))
        assert all(p.dtype == torch.float32 for p in model.parameters())
        moved = [t - s for t, s in zip(full(model.parameters()), start, strict=True)]
        close(moved, [p.detach() - s for p, s in zip(alone.parameters(), start, strict=True)], 0.02, method)
        for key in ("gradient_norm", "direction_norm", "perturbation_0", "noise_ratio"):
            assert agree(optimizer.diagnostics()[key].item()), key
        known = [float(o.diagnostics()["noise_ratio"]) for o in (optimizer, reference)]  # from the policy, from the casts
        assert known[0] == pytest.approx(known[1], rel=0.05)


def test_mixed_precision_policy_equals_one_process_in_bfloat16():
    run(2, _mixed_precision)


# -- decisions --------------------------------------------------------------------------------------------------------


def _decisions(rank):
    """An infinity in one rank's pass, an exception on all ranks, weights that FSDP was told to keep whole."""
    mesh = init_device_mesh("cpu", (2,))
    x, y = shard_of(rank, *batch(n=8, outputs=1, dtype=torch.float64))
    for base, (kind, options) in BASES.items():
        for bad in range(4):
            model = shard(net(), mesh=mesh)
            optimizer = make(model.parameters(), kind, "finite_difference", model=model, **options)
            closure = closure_of(optimizer, loss_of(model, x, y))
            optimizer.step(closure)
            before, calls = [bits(local(p)) for p in model.parameters()], iter(range(4))

            def spoilt(calls=calls, bad=bad, model=model):
                loss = loss_of(model, x, y)() * (float("inf") if next(calls) == bad and rank == 1 else 1.0)
                loss.backward()
                return loss

            optimizer.step(spoilt)
            same([bits(local(p)) for p in model.parameters()], before, f"{base} {bad}")
            assert optimizer.skipped_steps == 1, (base, bad)

            def fails(calls=iter(range(4)), bad=bad, model=model):  # noqa: B008
                if next(calls) == bad:
                    raise RuntimeError("bad batch")
                loss = loss_of(model, x, y)()
                loss.backward()
                return loss

            with pytest.raises(RuntimeError, match="bad batch"):
                optimizer.step(fails)
            same([bits(local(p)) for p in model.parameters()], before, f"{base} {bad}")
            optimizer.step(closure)
            assert optimizer.skipped_steps == 1


def _scaled(rank):
    """Loss scaling: unscaled before it is clipped, and every rank's scaler backs off when one rank's loss is infinite."""
    mesh = init_device_mesh("cpu", (2,))
    whole = batch(n=8, outputs=1)
    x, y = shard_of(rank, *whole)
    for method in METHODS:
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        alone, model = net(torch.float32), shard(net(torch.float32), mesh=mesh)
        reference = make(alone.parameters(), method=method, max_grad_norm=0.5)
        optimizer = make(model.parameters(), method=method, model=model, grad_scaler=scaler, max_grad_norm=0.5)
        for _ in range(3):
            reference.step(loss_of(alone, *whole))
            optimizer.step(loss_of(model, x, y))
            scaler.update()
        close(full(model.parameters()), list(alone.parameters()), 1e-5, method)
        optimizer.step(lambda model=model: loss_of(model, x, y)() * (float("inf") if rank else 1.0))
        scaler.update()
        assert (scaler.get_scale(), optimizer.skipped_steps) == (128.0, 1), method
        close(full(model.parameters()), list(alone.parameters()), 1e-5, method)


def test_loss_scaling_of_sharded_parameters():
    run(2, _scaled)


def _kept_whole(rank):
    """`set_reshard_after_backward(False)` keeps whole weights between passes: they must not hide the perturbation."""
    mesh = init_device_mesh("cpu", (2,))
    x, y = batch(n=8, outputs=1, dtype=torch.float64)
    alone, model = net(), shard(net(), mesh=mesh)
    model.set_reshard_after_backward(False)
    reference = make(alone.parameters())
    optimizer = make(model.parameters(), model=model)
    compare(optimizer, model, reference, alone, shard_of(rank, x, y), (x, y))
    with torch.no_grad():
        torch.testing.assert_close(model(x), alone(x), rtol=1e-9, atol=1e-9)


def test_all_ranks_decide_alike():
    run(2, _decisions)


def test_whole_weights_that_fsdp_keeps_are_gathered_anew():
    run(2, _kept_whole)


# -- other meshes -----------------------------------------------------------------------------------------------------


def _hybrid(rank):
    """Sharded over two ranks, replicated over two."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    x, y = batch(n=12, outputs=1, dtype=torch.float64)
    for method in METHODS:
        alone, model = net(), shard(net(), mesh=mesh)
        reference = make(alone.parameters(), method=method)
        optimizer = make(model.parameters(), method=method, model=model)
        compare(optimizer, model, reference, alone, shard_of(rank, x, y), (x, y), what=f"hybrid {method}")
        assert agree(fingerprint(full(model.parameters()))), method
        low = shard(net(torch.bfloat16), mesh=mesh)
        optimizer = make(low.parameters(), method=method, model=low)
        for _ in range(5):
            optimizer.step(loss_of(low, *(t.bfloat16() for t in shard_of(rank, x, y))))
        # replicas of a shard draw the same numbers for the stochastic rounding of their perturbed weights
        assert agree(optimizer.diagnostics()["perturbation_0"].item()), method
        assert agree(fingerprint(full(low.parameters()))), method
        assert fingerprint(full(low.parameters())) != fingerprint(net(torch.bfloat16).parameters())


def _tensor_parallel(rank):
    """Columns and rows of two layers over two ranks, biases replicated; the last layer is no DTensor at all."""
    mesh = init_device_mesh("cpu", (2,))
    x, y = batch(n=12, outputs=1, dtype=torch.float64)
    for method in METHODS:
        alone, model = net(hidden=(8, 5)), net(hidden=(8, 5))
        parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        kinds = {type(q) for p in model.parameters() if isinstance(p, DTensor) for q in p.placements}
        assert {Shard, Replicate} <= kinds
        reference = make(alone.parameters(), method=method, max_grad_norm=0.5)
        optimizer = make(model.parameters(), method=method, model=model, max_grad_norm=0.5)
        compare(optimizer, model, reference, alone, (x, y), (x, y), what=f"tensor parallel {method}")
        assert agree(fingerprint(full(model.parameters()))), method


def _two_dimensional(rank):
    """FSDP over tensor parallelism: rows are split twice, as strided shards."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    x, y = batch(n=12, outputs=1, dtype=torch.float64)
    data = mesh.get_local_rank("data")
    for method in METHODS:
        alone, model = net(hidden=(8, 5)), net(hidden=(8, 5))
        parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        for layer in (model[0], model[2], model[4]):
            fully_shard(layer, mesh=mesh["data"])
        fully_shard(model, mesh=mesh["data"])
        assert any("_StridedShard" in repr(p.placements) for p in model.parameters())
        reference = make(alone.parameters(), method=method)
        optimizer = make(model.parameters(), method=method, model=model)
        compare(optimizer, model, reference, alone, (x[data::2], y[data::2]), (x, y), what=f"two-dimensional {method}")
        assert agree(fingerprint(full(model.parameters()))), method


def test_fsdp_over_tensor_parallelism_equals_one_process():
    run(4, _two_dimensional)


def _two_meshes(rank):
    """A 2-D mesh: one parameter over both dimensions, one over each, one replicated, one plain; each counted once."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    torch.manual_seed(0)
    values = [torch.randn(5, 3, dtype=torch.float64) for _ in range(5)]
    places = [
        (mesh, [Shard(0), Shard(1)]),
        (mesh["a"], [Shard(0)]),
        (mesh["b"], [Shard(1)]),
        (mesh, [Replicate(), Replicate()]),
    ]
    for method in METHODS:
        alone = [nn.Parameter(v.clone()) for v in values]
        params = [nn.Parameter(distribute_tensor(v, m, p)) for v, (m, p) in zip(values, places, strict=False)]
        params.append(nn.Parameter(values[4].clone()))
        reference, optimizer = make(alone, method=method), make(params, method=method)

        def loss(of):
            whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in of]
            return sum((p * (i + 1)).cos().sum() for i, p in enumerate(whole)) * 0.1 + (whole[0] * whole[4]).exp().mean()

        for _ in range(3):
            reference.step(lambda alone=alone: loss(alone))
            optimizer.step(lambda params=params: loss(params))
        close(full(params), alone, 1e-9, method)
        for key, value in reference.diagnostics().items():
            torch.testing.assert_close(optimizer.diagnostics()[key], value, rtol=1e-6, atol=1e-9, msg=f"{method} {key}")


def _pending_gradients(rank):
    """Replicated weights and a sharded batch: gradients arrive as sums that are still to be added over the ranks."""
    mesh = init_device_mesh("cpu", (2,))
    x, _ = batch(n=12, dtype=torch.float64)
    rows = distribute_tensor(x, mesh, [Shard(0)])
    for method in METHODS:
        alone = nn.Parameter(torch.full((3, 1), 0.3, dtype=torch.float64))
        model = nn.Parameter(distribute_tensor(alone.detach().clone(), mesh, [Replicate()]))
        reference, optimizer = make([alone], method=method), make([model], method=method)

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = (rows @ model).tanh().square().sum().full_tensor()
            loss.backward()
            assert model.grad.placements[0].is_partial()
            return loss

        for _ in range(3):
            reference.step(lambda alone=alone: (x @ alone).tanh().square().sum())
            optimizer.step(closure)
        close(full([model]), [alone], 1e-9, method)


def test_pending_sums_of_gradients_are_added():
    run(2, _pending_gradients)


class Counting(nn.Module):
    """A DTensor parameter, and a DTensor buffer that every forward moves."""

    def __init__(self, mesh):
        super().__init__()
        self.weight = nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]))
        self.register_buffer("seen", distribute_tensor(torch.zeros(4), mesh, [Shard(0)]))

    def forward(self):
        with torch.no_grad():
            self.seen.add_(1.0)
        return self.weight.sin().sum().full_tensor()


def _buffers(rank):
    for method in METHODS:
        model = Counting(init_device_mesh("cpu", (2,)))
        optimizer = make(model.parameters(), method=method, model=model)
        optimizer.step(model)
        optimizer.step(model)
        assert torch.equal(full([model.seen])[0], torch.full((4,), 2.0)), method


def _weights_in_the_batch(rank):
    for method in METHODS:
        if method != "exact":
            model = shard(net())
            optimizer = make(model, method=method)
            x, y = batch(outputs=1, dtype=torch.float64)
            weight = model[0].weight
            before = fingerprint([weight.to_local()])
            optimizer.step(lambda b, model=model: (model(b[0]) - b[1]).square().mean(), (x, y, weight, weight.to_local()))
            assert fingerprint([weight.to_local()]) != before


def test_weights_in_the_batch_may_change():
    run(2, _weights_in_the_batch)


def test_sharded_buffers_move_once():
    run(2, _buffers)


def test_hybrid_sharding_equals_one_process():
    run(4, _hybrid)


def test_tensor_parallelism_equals_one_process():
    run(2, _tensor_parallel)


def test_parameters_on_several_meshes_count_once():
    run(4, _two_meshes)


# -- what cannot be ---------------------------------------------------------------------------------------------------


def _refusals(rank):
    mesh = init_device_mesh("cpu", (2,))
    model = shard(net(), mesh=mesh)
    for options, words in [
        ({"perturb_sync": "local"}, "perturb_sync='local'.*sharded"),
        ({"method": "exact"}, "method='exact'.*sharded"),
    ]:
        with pytest.raises(TypeError, match=words):
            make(model.parameters(), model=model, **options)
    with pytest.raises(ValueError, match=r"flatten=True.*DTensor"):
        make(model.parameters(), flatten=True)
    old = FullyShardedDataParallel(net(), device_id=torch.device("cpu"))
    with pytest.raises(TypeError, match="FSDP1"):
        make(old.parameters())
    old = FullyShardedDataParallel(net(), device_id=torch.device("cpu"), use_orig_params=True)
    with pytest.raises(TypeError, match="FSDP1"):
        make(old.parameters(), model=old)
    inner = net()
    optimizer = make(inner.parameters(), model=inner)
    old = FullyShardedDataParallel(inner, device_id=torch.device("cpu"), use_orig_params=True)  # as Accelerate does it
    with pytest.raises(TypeError, match="FSDP1"):
        optimizer.step(closure_of(optimizer, loss_of(old, *batch(outputs=1, dtype=torch.float64))))
    pending = nn.Parameter(DTensor.from_local(torch.ones(3), mesh, [Partial()]))
    with pytest.raises(TypeError, match="holds partial sums"):
        make([pending])
    elsewhere = DeviceMesh("cpu", [0])
    if rank == 1:
        with pytest.raises(TypeError, match="no shard on this rank"):
            make([nn.Parameter(DTensor.from_local(torch.ones(3), elsewhere, [Replicate()]))])
    x, y = batch(outputs=1, dtype=torch.float64)
    for gather, again in itertools.product((lambda: model(x), model.unshard), (False, True)):
        gather()
        early = make(model)  # of whole weights
        if again:
            model.reshard()
        with pytest.raises(RuntimeError, match=r"parameter 4 .* no memory any more.*reshard\(\)"):
            early.step(loss_of(model, x, y))
        model.reshard()
    closed = make(model)
    model.set_requires_gradient_sync(False)
    with pytest.raises(RuntimeError, match=r"FSDP has not reduced.*set_requires_gradient_sync\(True\)"):
        closed.step(loss_of(model, x, y))
    model.set_requires_gradient_sync(True)
    optimizer = make(model.parameters())
    optimizer.state[next(model.parameters())] = {"momentum_buffer": torch.zeros(7, 3, dtype=torch.float64)}
    with pytest.raises(TypeError, match=r"torch.distributed.checkpoint"):
        optimizer.step(closure_of(optimizer, loss_of(model, *batch(outputs=1, dtype=torch.float64))))


def test_what_cannot_be_says_why():
    run(2, _refusals)


def _all_reduces(rank):
    """One all-reduce of a few numbers per reduction: four in a GAM step, and nothing else of ours."""
    mesh = init_device_mesh("cpu", (2,))
    model = shard(net(), mesh=mesh)
    x, y = shard_of(rank, *batch(n=8, outputs=1, dtype=torch.float64))
    counts = []
    for method in METHODS:
        optimizer = make(model.parameters(), method=method)
        closure = closure_of(optimizer, loss_of(model, x, y))
        optimizer.step(closure)
        with unittest.mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as spy:
            optimizer.step(closure)
        counts.append((spy.call_count, sum(call.args[0].numel() for call in spy.call_args_list)))
    return counts


def test_one_all_reduce_per_reduction():
    for counts in run(2, _all_reduces):
        assert counts == [(2, 4), (4, 8), (4, 12)]
