"""DistributedDataParallel on two real processes: replicas stay equal, and equal what one process computes."""

from __future__ import annotations

import copy
import itertools
import os
import unittest.mock
from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.distributed as dist
from float64_gam import Gam64
from gam_helpers import (
    METHODS,
    PASSES,
    SETTINGS,
    batch,
    bits,
    close,
    closure_of,
    functional_loss,
    make,
    mlp,
    regression,
    same,
)
from ranks import agree, fingerprint, run, shard_of
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from gam_fused.integrations import BatchClosure

pytestmark = pytest.mark.processes
MODES = ("global", "local")
BOUNDED = ("finite_difference", "exact", "gradient_penalty")
NOT_OF_FLOAT64 = ("rho", "max_grad_norm", "flatness_fraction")
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


def on_batch(optimizer, model, batch):
    """The loss of a mini-batch, or of its first part; a rank's first samples are among the first of all ranks."""
    return BatchClosure(lambda part: closure_of(optimizer, regression(model, *part))(), batch)


def build(model, mode, method="finite_difference", base="sgd", ddp=None, **options):
    wrapped = DistributedDataParallel(model, **(ddp or {}))
    kind, base_options = BASES[base]
    options = {"model": wrapped, **base_options, **options}
    return wrapped, make(wrapped.parameters(), kind, method, perturb_sync=mode, **options)


# -- replicas stay equal ----------------------------------------------------------------------------------------------


def _long_run(rank, mode, views):
    results, options = {}, {"gradient_as_bucket_view": views, "find_unused_parameters": True}
    for method in METHODS:
        model, optimizer = build(Heads(), mode, method, ddp=options)
        unused = bits(model.module.unused.weight)
        start = fingerprint(model.parameters())
        torch.manual_seed(100 + rank)  # other dropout masks, other batches
        for _ in range(100 if method == "finite_difference" else 20):
            x, y = torch.randn(8, 3), torch.randn(8, 2)
            loss_fn = lambda x=x, y=y, model=model: (model(x, rank) - y).square().mean()  # noqa: E731
            optimizer.step(closure_of(optimizer, loss_fn))
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


def _full_batch(rank, backend, views):
    """Global mode on half batches against one process on the whole batch; every method, base and option that has norms.

    With views, DDP's blocks hold the gradients, and the next pass overwrites them.
    """
    x, y = batch(dtype=torch.float64)
    half, ddp = shard_of(rank, x, y), {"gradient_as_bucket_view": views}
    cases = [(m, base, {}) for m in METHODS for base in BASES]
    cases += [(m, "sgd", {"max_grad_norm": 0.05}) for m in METHODS] + [("accelerated", "sgd", {"adaptive": True})]
    cases += [("exact", "sgd", {"oracle": "sam", "sam_rho": 0.3}), ("finite_difference", "sgd", {"interval": 2})]
    cases += [("exact", "sgd", {"interval": 2})]
    cases += [(m, "sgd", {"max_ratio": 0.05}) for m in BOUNDED] + [(m, "adamw", {"flatness_fraction": 0.5}) for m in METHODS]
    for method, base, options in cases:
        alone = mlp(torch.float64)
        kind, base_options = BASES[base]
        reference = make(alone.parameters(), kind, method, backend=backend, **base_options, **options)
        model, optimizer = build(mlp(torch.float64), "global", method, base, ddp, backend=backend, **options)
        for _ in range(3):
            reference.step(on_batch(reference, alone, (x, y)))
            optimizer.step(on_batch(optimizer, model, half))
        close(list(model.parameters()), list(alone.parameters()), 1e-9, f"{method} {base} {options}: weights")
        ours, theirs = optimizer.diagnostics(), reference.diagnostics()
        for key in set(theirs) - {"loss", "sharpness"}:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-6, atol=1e-9, msg=f"{method} {base} {options}: {key}")


@pytest.mark.parametrize(("backend", "views"), [("auto", False), ("auto", True), ("reference", True)])
def test_global_mode_equals_one_process_on_the_whole_batch(backend, views):
    run(2, _full_batch, backend, views)


def _local_against_float64(rank, backend):
    """Each rank's own d, by `Gam64` on that rank's half, averaged; then the base's update, everywhere."""
    x, y = batch(dtype=torch.float64)
    halves = [(x[r::2], y[r::2]) for r in range(2)]
    for method, base, options in [
        *((m, b, {}) for m in METHODS for b in BASES),
        *((m, "sgd", {"max_grad_norm": 0.05}) for m in METHODS),
        ("accelerated", "adamw", {"adaptive": True}),
        ("finite_difference", "sgd", {"oracle": "sam"}),
        *((m, "sgd", {"max_ratio": 0.3, "alpha": float("inf"), "xi": 1e-3}) for m in BOUNDED),
        *((m, "adamw", {"flatness_fraction": 0.5}) for m in METHODS),
    ]:
        model, optimizer = build(mlp(torch.float64), "local", method, base, backend=backend, **options)
        twin = mlp(torch.float64)
        kind, base_options = BASES[base]
        plain = kind(twin.parameters(), **base_options)
        settings = {k: v for k, v in (SETTINGS[method] | options).items() if k not in NOT_OF_FLOAT64}
        parts = [functional_loss(twin, *(t[: len(t) // 2] for t in half)) for half in halves]
        for _ in range(3):
            optimizer.step(on_batch(optimizer, model, halves[rank]))
            groups = [{"params": list(twin.parameters()), "rho": SETTINGS[method]["rho"]}]
            exact = [Gam64(groups, method=method, **settings) for _ in halves]
            if "flatness_fraction" in options:
                for own, part in zip(exact, parts, strict=True):
                    own.loss_on_part = part
            directions = [j.direction(functional_loss(twin, *half)) for j, half in zip(exact, halves, strict=True)]
            for p, *ds in zip(twin.parameters(), *directions, strict=True):
                p.grad = (ds[0] + ds[1]) / 2
            norm = nn.utils.clip_grad_norm_(twin.parameters(), options.get("max_grad_norm", float("inf")))
            expected = min(norm.item(), options.get("max_grad_norm", float("inf")))
            seen = optimizer.diagnostics()
            assert seen["direction_norm"].item() == pytest.approx(expected, rel=1e-4)
            if method == "accelerated" or "max_ratio" in options:  # of this rank
                own = exact[rank]
                cosine = own.dot(own.minus, own.plus) / (own.dot(own.plus, own.plus) * own.dot(own.minus, own.minus)) ** 0.5
                assert seen["cosine"].item() == pytest.approx(cosine, rel=1e-6)
            plain.step()
        close(list(model.parameters()), list(twin.parameters()), 1e-8, f"{method} {base} {options}: weights")


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_local_mode_averages_each_ranks_own_direction(backend):
    run(2, _local_against_float64, backend)


# -- decisions --------------------------------------------------------------------------------------------------------


def _non_finite(rank, mode):
    """An infinity on one rank, in one pass: every rank skips the step, leaves its scaler alike, and goes on."""
    x, y = shard_of(rank, *batch())
    for method, base in [*((m, "sgd") for m in METHODS), ("finite_difference", "adamw"), ("accelerated", "foreign")]:
        for bad in range(PASSES[method]):
            scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
            model, optimizer = build(mlp(), mode, method, base, grad_scaler=scaler)
            spoil = {"at": None}
            calls = iter(range(10**6))

            def loss_fn(model=model, calls=calls, spoil=spoil):
                loss = (model(x) - y).square().mean()
                return loss * float("inf") if next(calls) == spoil["at"] and rank == 1 else loss

            for step in range(3):
                before = fingerprint(model.parameters())
                spoil["at"] = bad + PASSES[method] if step == 1 else None
                optimizer.step(loss_fn)
                scaler.update()
                moved = fingerprint(model.parameters()) != before
                assert moved == (step != 1), (method, base, bad, step)
            assert (optimizer.skipped_steps, scaler.get_scale()) == (1, 128.0), (method, base, bad)
            assert agree(fingerprint(model.parameters())), (method, base, bad)


@pytest.mark.parametrize("mode", MODES)
def test_an_infinity_on_one_rank_skips_the_step_on_all(mode):
    run(2, _non_finite, mode)


def _scaled(rank):
    """The loss scale changes nothing but rounding: local directions are averaged scaled, and clipped unscaled."""
    x, y = shard_of(rank, *batch())
    for method in METHODS:
        runs = []
        for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
            model, optimizer = build(mlp(), "local", method, grad_scaler=scaler, max_grad_norm=0.1)
            for _ in range(3):
                optimizer.step(regression(model, x, y))
                if scaler:
                    scaler.update()
            runs.append((list(model.parameters()), optimizer.diagnostics()["direction_norm"].item()))
        for p, q in zip(runs[0][0], runs[1][0], strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        assert runs[0][1] == pytest.approx(runs[1][1], rel=1e-4)
        assert runs[0][1] == pytest.approx(0.1, rel=1e-4)


def test_loss_scale_and_clipping_in_local_mode():
    run(2, _scaled)


def _buffers(rank, mode):
    """As after one DDP pass: each rank has moved its own; the next forward brings in line with rank 0."""
    for method in METHODS:
        net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        twin = DistributedDataParallel(copy.deepcopy(net))
        model, optimizer = build(net, mode, method)
        for step in range(4):
            x, y = batch(seed=10 * step + rank)
            twin.load_state_dict(copy.deepcopy(model.state_dict()))
            twin(x)
            optimizer.step(closure_of(optimizer, regression(model, x, y)))
            same([bits(b) for b in model.buffers()], [bits(b) for b in twin.buffers()], f"{method} {step}")
            assert not agree(fingerprint(model.buffers()))
        with torch.no_grad():
            model.eval()(x)
        assert agree(fingerprint(model.buffers())), method


@pytest.mark.parametrize("mode", MODES)
def test_buffers_are_as_after_one_pass_of_ddp(mode):
    run(2, _buffers, mode)


def _failures(rank):
    """Local mode: a rank whose step failed, and which caught that, comes later; the others wait for its next step."""
    x, y = shard_of(rank, *batch())
    for method in METHODS:
        model, optimizer = build(mlp(), "local", method)
        for step in range(4):
            if step == 1 and rank == 1:
                before, calls = fingerprint(model.parameters()), iter(range(9))

                def fails(model=model, calls=calls, method=method):
                    if next(calls) == PASSES[method] - 1:
                        raise RuntimeError("bad batch")
                    return (model(x) - y).square().mean()

                with pytest.raises(RuntimeError, match="bad batch"):
                    optimizer.step(fails)
                assert fingerprint(model.parameters()) == before
            optimizer.step(regression(model, x, y))
        assert agree(fingerprint(model.parameters())), method
        assert model.require_backward_grad_sync


def test_a_failed_step_of_one_rank_in_local_mode_leaves_all_alike():
    run(2, _failures)


def _dies(rank, mode, bad, folder):
    """Rank 1 dies in pass `bad` of step 2; rank 0 finds the connection closed, and its weights as before the step."""
    x, y = shard_of(rank, *batch())
    model, optimizer = build(mlp(), mode)
    optimizer.step(regression(model, x, y))
    torch.save([bits(p) for p in model.parameters()], f"{folder}/before-{rank}")
    calls = iter(range(9))

    def loss_fn():
        if next(calls) == bad and rank == 1:
            os._exit(0)
        return (model(x) - y).square().mean()

    with pytest.raises(RuntimeError, match=r"(?i)connection|closed|peer"):
        optimizer.step(loss_fn)
    torch.save([bits(p) for p in model.parameters()], f"{folder}/after-{rank}")
    os._exit(0)


@pytest.mark.parametrize(("mode", "bad"), [("global", 0), ("global", 2), ("local", 3)])
def test_a_rank_that_dies_leaves_the_weights_of_the_others(mode, bad, tmp_path):
    with pytest.raises(FileNotFoundError):  # no rank returns anything
        run(2, _dies, mode, bad, str(tmp_path))
    before, after = (torch.load(tmp_path / f"{when}-0") for when in ("before", "after"))
    same(after, before)


# -- cost, and what cannot be -----------------------------------------------------------------------------------------


def _communication(rank):
    """All-reduces of DDP and of ours per step: local mode makes one, in one flat buffer per dtype."""
    x, y = shard_of(rank, *batch())
    counts = {}
    for mode in MODES:
        for method in METHODS:
            model, optimizer = build(mlp(), mode, method)
            buckets = []

            def hook(state, bucket, buckets=buckets):
                buckets.append(bucket.index())
                return allreduce_hook(state, bucket)

            model.register_comm_hook(None, hook)
            optimizer.step(regression(model, x, y))
            buckets.clear()
            with unittest.mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as spy:
                optimizer.step(regression(model, x, y))
            counts[mode, method] = (len(buckets), spy.call_count - len(buckets))  # the hook calls it too
    return counts


def test_local_mode_communicates_once_per_step():
    for counts in run(2, _communication):
        assert all(counts["local", method] == (0, 1) for method in METHODS)
        assert counts["global", "sam"] == (2, 0)
        assert counts["global", "finite_difference"] == counts["global", "accelerated"] == (4, 0)
        assert counts["global", "exact"] == (0, 4)  # two gradients, two products


def _refusals(rank):
    plain = mlp()
    for model in (None, plain):
        with pytest.raises(ValueError, match=r"perturb_sync='local'.*wrap the model first"):
            make(plain.parameters(), perturb_sync="local", model=model)
    wrapped = DistributedDataParallel(plain)
    outside = mlp(seed=3)
    with pytest.raises(ValueError, match=r"parameter 4 of group 0 .*not averaged by the DistributedDataParallel"):
        make([*wrapped.parameters(), *outside.parameters()], perturb_sync="local", model=wrapped)
    optimizer = make(wrapped.parameters(), method="exact")
    before = fingerprint(wrapped.parameters())
    with pytest.raises(RuntimeError, match=r"method='exact'.*model=ddp_model"):
        optimizer.step(regression(wrapped, *batch()))
    assert fingerprint(wrapped.parameters()) == before
    optimizer = make(wrapped.parameters(), method="exact", model=wrapped)
    other = DistributedDataParallel(mlp(seed=5))
    with pytest.raises(RuntimeError, match=r"method='exact'.*model=ddp_model"):
        optimizer.step(lambda: regression(wrapped, *batch())() + regression(other, *batch())())
    assert fingerprint(wrapped.parameters()) == before
    by_itself = [dist.new_group([r]) for r in range(2)][rank]
    alone = DistributedDataParallel(mlp(seed=4), process_group=by_itself)
    make(alone.parameters(), method="exact").step(regression(alone, *batch()))  # with nobody to average with
    with pytest.raises(ValueError, match="several process groups"):
        make([*wrapped.parameters(), *alone.parameters()], perturb_sync="local", model=[wrapped, alone])
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(outside, ["2.bias"])
    with pytest.raises(ValueError, match=r"parameter 3 of group 0 .*not averaged by the DistributedDataParallel"):
        make(outside.parameters(), perturb_sync="local", model=DistributedDataParallel(outside))
    inside = nn.ModuleDict({"trained": wrapped})
    optimizer = make(wrapped.parameters(), perturb_sync="local", model=inside)
    with pytest.raises(ValueError, match="not averaged"):
        optimizer.add_param_group({"params": list(outside.parameters())})
    assert len(optimizer.param_groups) == 1
    optimizer.step(regression(wrapped, *batch()))
    assert agree(fingerprint(wrapped.parameters()))


def test_local_mode_says_what_it_needs():
    run(2, _refusals)


@contextmanager
def _left_alone(model):
    before = fingerprint(model.parameters())
    yield
    assert fingerprint(model.parameters()) == before


def _what_needs_reductions_by_ddp(rank):
    """Errors on all ranks alike, in place of torch's internal one and of collectives that do not match."""
    x, y = batch()
    for method, mode in (("sam", "local"), ("exact", "global")):
        told = mode if mode == "local" else method
        model = DistributedDataParallel(mlp(), static_graph=True)
        optimizer = make(model.parameters(), method=method, model=model, perturb_sync=mode)
        with _left_alone(model), pytest.raises(RuntimeError, match=f"{told}'.*static_graph=True"):
            optimizer.step(regression(model, x, y))
        model = DistributedDataParallel(mlp())
        optimizer = make(model.parameters(), method=method, model=model, perturb_sync=mode)
        with _left_alone(model), pytest.raises(RuntimeError, match=rf"{told}'.*join\(\)"), model.join():
            optimizer.step(regression(model, x, y))
    trained, other = (DistributedDataParallel(mlp()) for _ in range(2))
    optimizer = make(trained.parameters(), method="exact", model=trained)
    with _left_alone(trained), pytest.raises(RuntimeError, match=r"discriminator, let it call that one's \.module"):
        optimizer.step(lambda: (trained(x) + other(x) - y).square().mean())
    x, y = shard_of(rank, x, y)
    optimizer.step(lambda: (trained(x) + other.module(x) - y).square().mean())
    assert agree(fingerprint(trained.parameters()))


def test_modes_of_ddp_that_need_its_reductions_are_refused():
    run(2, _what_needs_reductions_by_ddp)


def _joined_and_static(rank):
    """With "global", DDP makes its reductions itself."""
    x, y = batch()
    for options in ({"static_graph": True, "gradient_as_bucket_view": True}, {}):
        model = DistributedDataParallel(mlp(), **options)
        optimizer = make(model.parameters(), model=model)
        with model.join() if not options else nullcontext():
            for _ in range(2 if options else 2 + rank):
                optimizer.step(regression(model, x, y))
        assert agree(fingerprint(model.parameters()))


def test_join_and_static_graphs_with_global_perturbations():
    run(2, _joined_and_static)


def _changed(rank):
    """The method, then the mode."""
    model, optimizer = build(mlp(), "global")
    for method, mode in (("sam", "global"), ("exact", "global"), ("sam", "global"), ("sam", "local")):
        optimizer.method, optimizer.perturb_sync = method, mode
        before = fingerprint(model.parameters())
        optimizer.step(regression(model, *shard_of(rank, *batch())))
        assert agree(fingerprint(model.parameters())), (method, mode)
        assert fingerprint(model.parameters()) != before
        assert (optimizer.session.replicas is not None) == (method == "exact" or mode == "local")


def test_who_averages_follows_changes_between_steps():
    run(2, _changed)


def _of_other_optimizers(rank):
    for method, mode in (("sam", "local"), ("exact", "global")):
        net = mlp()
        model = DistributedDataParallel(net)
        optimizer = make(net[0].parameters(), method=method, model=model, perturb_sync=mode)
        before = fingerprint(net.parameters())
        closure = regression(model, *shard_of(rank, *batch()))
        with pytest.raises(ValueError, match=rf"{mode if mode == 'local' else method}'.*: 2\.weight \(shape \(2, 5\)\)"):
            optimizer.step(closure)
        assert fingerprint(net.parameters()) == before
        for ignored in (True, False):  # DDP does not average those that it is told to ignore: each rank has its own
            if ignored:
                DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(net, ["2.weight", "2.bias"])
            else:
                net[2].requires_grad_(False)
            model = DistributedDataParallel(net)
            optimizer = make(net[0].parameters(), method=method, model=model, perturb_sync=mode)
            optimizer.step(regression(model, *shard_of(rank, *batch())))
            assert agree(fingerprint(net.parameters()))
            assert fingerprint(net.parameters()) != before
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(net, [])


def test_gradients_for_another_optimizer_that_nobody_averages_are_refused():
    run(2, _of_other_optimizers)


def _low_precision(rank, mode):
    """bf16 and float64 side by side: stochastic rounding is the same on all ranks, and each dtype has its buffer."""
    for method in METHODS:
        net = nn.ModuleList([nn.Linear(3, 4).bfloat16(), nn.Linear(4, 2).double()])

        class Mixed(nn.Module):
            def __init__(self, net=net):
                super().__init__()
                self.net = net

            def forward(self, x):
                return self.net[1](self.net[0](x.bfloat16()).tanh().double())

        model, optimizer = build(Mixed(), mode, method)
        for step in range(10):
            x, y = batch(seed=20 * step + rank)
            optimizer.step(closure_of(optimizer, regression(model, x, y)))
        assert agree(fingerprint(model.parameters())), method
        assert optimizer.skipped_steps == 0


@pytest.mark.parametrize("mode", MODES)
def test_dtypes_side_by_side(mode):
    run(2, _low_precision, mode)
