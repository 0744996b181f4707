"""Mixed precision: autocast, GradScaler in both ways of stepping, and weights that are stored in bf16 or fp16."""

from __future__ import annotations

import math

import pytest
import torch
from gam_helpers import EVERY_PASS, METHODS, batch, frozen_without_counters, make, mlp, regression, same, trainer, weights
from torch import nn
from torch.func import functional_call

FORMS = {
    "optimizer.step": lambda optimizer, scaler, closure: optimizer.step(closure),
    "scaler.step": lambda optimizer, scaler, closure: scaler.step(optimizer, closure),
}
CLOSURES = ("returns_loss", "calls_backward")
DEVICES = ["cpu", pytest.param("cuda", marks=[
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
])]  # fmt: skip
forms = pytest.mark.parametrize("form", FORMS)


class Task:
    """A small network, a GradScaler that the optimizer knows, and a pass whose gradient can be made infinite."""

    def __init__(self, method="finite_difference", kind="returns_loss", device="cpu", scale=1024.0, base="sgd", **options):
        self.model = mlp().to(device)
        self.x, self.y = (t.to(device) for t in batch())
        self.scaler = torch.amp.GradScaler(device, init_scale=scale, growth_interval=1000)
        base = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW, "foreign": torch.optim.NAdam}[base]
        options.setdefault("grad_scaler", self.scaler)
        self.optimizer = make(self.model.parameters(), base, method, **options)
        self.kind, self.bad, self.calls = kind, None, 0

    def closure(self):
        self.optimizer.zero_grad()
        loss = regression(self.model, self.x, self.y)()
        if self.calls == self.bad:
            loss = loss * float("inf")
        self.calls += 1
        if self.kind == "calls_backward":
            self.scaler.scale(loss).backward()
        return loss

    def step(self, form, bad=None, update=True):
        self.bad, self.calls = bad, 0
        loss = FORMS[form](self.optimizer, self.scaler, self.closure)
        if update:
            self.scaler.update()
        return loss

    def frozen(self):
        return frozen_without_counters(self.optimizer)


def kinds(method):
    return CLOSURES[:1] if method == "exact" else CLOSURES


@pytest.mark.parametrize("device", DEVICES)
@forms
@pytest.mark.parametrize("method", METHODS)
def test_every_pass_is_unscaled_once(method, form, device):
    """A scale that is a power of two changes no bit, whoever calls backward and whoever makes the step."""
    for kind in kinds(method):
        options = {"max_grad_norm": 0.05, "interval": 2, "device": device}
        plain = Task(method, grad_scaler=None, **options)
        scaled = Task(method, kind, **options)
        for _ in range(4):
            expected = plain.optimizer.step(plain.closure)
            assert torch.equal(scaled.step(form), expected)
        same(scaled.frozen(), plain.frozen())
        assert float(scaled.optimizer.diagnostics()["direction_norm"]) <= 0.05 * (1 + 1e-6)
        assert scaled.scaler.get_scale() == 1024.0


@pytest.mark.parametrize("form", ["optimizer.step", "scaler.step"])
@pytest.mark.parametrize("method", METHODS)
def test_a_part_of_the_batch_is_unscaled_too(method, form):
    """`scaler.step(optimizer, closure, batch)` is `optimizer.step(closure, batch)`."""
    for kind in kinds(method):
        results = []
        for scaled in (False, True):
            scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
            model, seen = mlp(), []
            optimizer = make(
                model.parameters(), method=method, flatness_fraction=1 / 2, max_grad_norm=0.05, grad_scaler=scaler
            )

            def closure(part, model=model, scaler=scaler, seen=seen, kind=kind):
                seen.append(len(part[0]))
                loss = regression(model, *part)()
                if kind == "calls_backward":
                    scaler.scale(loss).backward()
                return loss

            losses = []
            for _ in range(3):
                if form == "scaler.step":
                    losses.append(scaler.step(optimizer, closure, batch(8)))
                else:
                    losses.append(optimizer.step(closure, batch(8)))
                scaler.update()
            assert seen[0] == 8
            assert set(seen) == {8, 4}
            results.append((torch.stack(losses), frozen_without_counters(optimizer), seen))
        assert torch.equal(results[0][0], results[1][0])
        same(results[0][1], results[1][1])
        assert results[0][2] == results[1][2]


@pytest.mark.parametrize("device", DEVICES)
@forms
@pytest.mark.parametrize("base", ["sgd", "adamw", "foreign"])
@pytest.mark.parametrize(("method", "bad"), EVERY_PASS)
def test_an_infinity_in_any_pass_skips_the_step_and_lowers_the_scale(method, bad, base, form, device):
    for kind in kinds(method):
        task, twin = (Task(method, kind, device, base=base) for _ in range(2))
        task.step(form), twin.step(form)
        before = task.frozen()
        task.step(form, bad)
        same(task.frozen(), before)
        assert task.scaler.get_scale() == 512.0
        assert task.optimizer.skipped_steps == 1
        task.step(form), twin.step(form)
        same(task.frozen(), twin.frozen())
        assert task.scaler.get_scale() == 512.0


@forms
def test_the_first_step_may_be_the_bad_one(form):
    task, twin = Task(base="adamw"), Task(base="adamw")
    task.step(form, bad=2)
    task.step(form), twin.step(form)
    same(task.frozen(), twin.frozen())
    assert task.scaler.get_scale() == 512.0


@forms
def test_a_scale_that_grows_with_every_step(form):
    growing, steady = Task(scale=1.0), Task(scale=1024.0)
    growing.scaler.set_growth_interval(1)
    for _ in range(5):
        growing.step(form), steady.step(form)
    same(weights(growing.optimizer), weights(steady.optimizer))
    assert growing.scaler.get_scale() == 32.0


@pytest.mark.parametrize("device", DEVICES)
@forms
def test_fp16_autocast_finds_its_scale_and_trains(form, device):
    """The scale starts where fp16 gradients overflow: every skip halves it, and then the loss falls."""
    task = Task(scale=2.0**30, device=device)
    inner, losses = task.closure, []

    def closure():
        with torch.autocast(device, torch.float16):
            return inner()

    task.closure = closure
    for _ in range(60):
        losses.append(float(task.step(form)))
    skipped = task.optimizer.skipped_steps
    assert 5 < skipped < 30
    assert task.scaler.get_scale() == 2.0 ** (30 - skipped)
    assert losses[0] == losses[skipped]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("method", METHODS)
def test_bf16_autocast_around_the_step_or_inside_the_closure(method):
    """An autocast context keeps casts of the weights; around the step it must not keep those of another pass."""
    results = []
    for where in ("inside, no cache", "inside", "around"):
        model = mlp()
        optimizer = make(model.parameters(), method=method)
        loss_fn = regression(model, *batch())

        def closure(loss_fn=loss_fn, where=where):
            with torch.autocast("cpu", torch.bfloat16, enabled=where != "around", cache_enabled="no cache" not in where):
                return loss_fn()

        for _ in range(3):
            if where == "around":
                with torch.autocast("cpu", torch.bfloat16):
                    optimizer.step(loss_fn)
            else:
                optimizer.step(closure)
        results.append(weights(optimizer))
    same(results[1], results[0])
    same(results[2], results[0])


@pytest.mark.parametrize("kind", CLOSURES)
def test_a_scaler_that_the_optimizer_does_not_know_is_an_error(kind):
    task = Task(kind=kind, grad_scaler=None)
    task.scaler.scale(torch.zeros(()))  # otherwise torch's own "Attempted step but _scale is None" comes first
    before = task.frozen()
    with pytest.raises(RuntimeError, match="grad_scaler=scaler"):
        task.step("scaler.step")
    same(task.frozen(), before)
    assert not hasattr(task.optimizer, "found_inf")
    task.optimizer.grad_scaler = task.scaler
    task.step("scaler.step")
    told = Task(kind=kind)
    told.step("scaler.step")
    same(task.frozen(), told.frozen())


def test_the_scaler_can_be_taken_away_again():
    task, plain = Task(), Task(grad_scaler=None)
    task.step("optimizer.step"), plain.optimizer.step(plain.closure)
    task.optimizer.grad_scaler = None
    task.optimizer.step(task.closure), plain.optimizer.step(plain.closure)
    same(task.frozen(), plain.frozen())


@forms
@pytest.mark.parametrize("interval", [1, 2])
def test_a_closure_that_unscales_is_an_error(interval, form):
    """Also in a step of one pass, where torch would not notice a second call."""
    task = Task(kind="calls_backward", interval=interval)
    for _ in range(interval - 1):
        task.step(form)
    inner, before = task.closure, task.frozen()

    def closure():
        loss = inner()
        task.scaler.unscale_(task.optimizer)
        nn.utils.clip_grad_norm_(task.model.parameters(), 1.0)
        return loss

    task.closure = closure
    with pytest.raises(RuntimeError, match="max_grad_norm"):
        task.step(form)
    same(task.frozen(), before)
    assert not hasattr(task.optimizer, "grad_scale")  # of `scaler.step`
    task.closure = inner
    task.scaler.update(1024.0)
    task.step(form)


@forms
@pytest.mark.parametrize("bad", [0, 2])
def test_a_closure_that_does_not_scale_is_an_error(bad, form):
    task, count = Task(kind="calls_backward"), iter(range(100))
    loss_fn, inner, before = regression(task.model, *batch()), task.closure, task.frozen()

    def closure():
        if next(count) != bad:
            return inner()
        loss_fn().backward()

    task.closure = closure
    with pytest.raises(RuntimeError, match="has not scaled"):
        task.step(form)
    same(task.frozen(), before)
    assert "scale" not in vars(task.scaler)
    task.scaler.update(1024.0)
    task.step(form)
    assert task.optimizer.skipped_steps == 0


@forms
def test_a_forgotten_update_is_an_error(form):
    task = Task()
    task.step(form, update=False)
    before = task.frozen()
    with pytest.raises(RuntimeError, match="update"):
        task.step(form)
    same(task.frozen(), before)


def test_a_step_that_is_refused_leaves_nothing_of_the_scaler_behind():
    model = mlp()
    scaler = torch.amp.GradScaler("cpu")
    optimizer = make(model.parameters(), grad_scaler=scaler)
    loss_fn = regression(model, *batch())
    optimizer.param_groups[0]["rho"] = math.nan
    with pytest.raises(ValueError, match="rho"):
        scaler.step(optimizer, loss_fn)
    optimizer.param_groups[0]["rho"], optimizer.grad_scaler = 0.1, None
    optimizer.step(loss_fn)


def test_a_second_scaler_is_an_error():
    """It would find no record of an infinity, as torch says."""
    task, other = Task(), torch.amp.GradScaler("cpu")
    other.scale(torch.zeros(()))
    other.step(task.optimizer, task.closure)
    with pytest.raises(AssertionError, match="No inf checks"):
        other.update()


def test_a_disabled_scaler_does_nothing():
    task, plain = Task(grad_scaler=None), Task(grad_scaler=None)
    task.scaler = torch.amp.GradScaler("cpu", enabled=False)
    task.optimizer.grad_scaler = task.scaler
    for form in FORMS:
        task.step(form)
        plain.optimizer.step(plain.closure)
    same(task.frozen(), plain.frozen())


def test_other_things_are_no_scalers():
    with pytest.raises(TypeError, match="GradScaler"):
        Task(grad_scaler=1024.0)


@forms
def test_gradients_left_by_an_earlier_backward_are_not_counted(form):
    task, twin = Task(), Task()
    task.scaler.scale(regression(task.model, task.x, task.y)() * 3).backward()
    task.step(form), twin.step(form)
    same(task.frozen(), twin.frozen())


@pytest.mark.parametrize("zero_grad", [True, False])
@pytest.mark.parametrize("kind", [None, "scaler"])
@pytest.mark.parametrize("method", [m for m in METHODS if m != "exact"])
def test_accumulation_over_micro_batches_equals_the_whole_batch(method, kind, zero_grad):
    """A closure over micro-batches, with or without `zero_grad`, with or without a scaler."""
    results = []
    for pieces in (1, 4):
        task = Task(method, grad_scaler=None)
        task.optimizer.grad_scaler = task.scaler if kind else None

        def closure(task=task, pieces=pieces):
            if zero_grad:
                task.optimizer.zero_grad()
            total = 0.0
            for x, y in zip(task.x.chunk(pieces), task.y.chunk(pieces), strict=True):
                loss = regression(task.model, x, y)() / pieces
                (task.scaler.scale(loss) if kind else loss).backward()
                total += loss.detach()
            return total

        task.closure = closure
        for _ in range(3):
            task.step("optimizer.step", update=kind is not None)
        results.append(list(task.model.parameters()))
    for whole, accumulated in zip(*results, strict=True):
        torch.testing.assert_close(accumulated, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_no_synchronisation_with_a_scaler():
    task = Task(device="cuda")
    task.step("optimizer.step")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        task.step("optimizer.step")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_example():
    pytest.importorskip("sklearn", reason="needs the package scikit-learn")
    from examples.loops.mixed_precision import train

    assert train(epochs=3, limit=192) > 0.3


# Weights stored in low precision.


def flat(tensors):
    return torch.cat([t.detach().double().flatten() for t in tensors])


@pytest.mark.parametrize(("dtype", "rho_prime"), [(torch.bfloat16, 0.02), (torch.float16, 0.0025)], ids=str)
def test_low_precision_weights_keep_the_hessian_vector_product(dtype, rho_prime):
    """2.5 million weights: rounded to nearest the probe loses a third of the curvature, rounded stochastically nothing.

    The points are what `step` stores; gradients at them are exact (float32), so only the rounding of the weights counts.
    """
    sklearn_datasets = pytest.importorskip("sklearn.datasets", reason="needs the package scikit-learn")
    images, labels = sklearn_datasets.load_digits(return_X_y=True)
    x, y = torch.tensor(images[:128] / 16, dtype=torch.float32), torch.tensor(labels[:128])
    width = 1536
    net = nn.Sequential(nn.Linear(64, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 10))
    names = [name for name, _ in net.named_parameters()]

    def loss_at(point):
        values = dict(zip(names, [p.float() for p in point], strict=True))
        return nn.functional.cross_entropy(functional_call(net, values, (x,)), y)

    def gradient(point, **options):
        point = [p.detach().float().requires_grad_() for p in point]
        return point, torch.autograd.grad(loss_at(point), point, **options)

    weights_ = [p.detach().to(dtype).requires_grad_() for p in net.parameters()]
    point, g = gradient(weights_, create_graph=True)
    norm = flat(g).norm().float()
    v = [t.detach() / norm for t in g]
    exact = flat(torch.autograd.grad(g, point, v))

    visited = []
    optimizer = make(weights_, rho_prime=rho_prime, lr=0.0, alpha=0.0)

    def closure():
        visited.append([p.detach().clone() for p in weights_])
        return loss_at(weights_)

    optimizer.step(closure)
    nearest = [(p + rho_prime * t).to(dtype) for p, t in zip(point, v, strict=True)]

    def cosine_and_scale(probe):
        estimate = (flat(gradient(probe)[1]) - flat(g)) / rho_prime
        return float(estimate @ exact / (estimate.norm() * exact.norm())), float(estimate @ exact / exact.square().sum())

    cosine, scale = cosine_and_scale(visited[1])
    assert cosine > 0.96, f"cosine {cosine:.3f}"
    assert abs(scale - 1) < 0.1, f"scale {scale:.3f}"
    cosine, scale = cosine_and_scale(nearest)
    assert cosine < 0.94, f"round to nearest would do: cosine {cosine:.3f}"
    assert scale < 0.8, f"round to nearest would do: scale {scale:.3f}"


@pytest.mark.parametrize("method", [m for m in METHODS if m != "exact"])
def test_diagnostics_are_unscaled(method):
    told = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        model = mlp(torch.float64)
        optimizer, _ = trainer(method, model, lambda: None, grad_scaler=scaler)
        optimizer.step(regression(model, *batch(dtype=torch.float64)))
        told.append(optimizer.diagnostics())
    for name, value in told[0].items():
        assert told[1][name].item() == pytest.approx(value.item(), rel=1e-9, abs=1e-12), name


def test_a_disabled_scaler_is_none():
    """A closure need not scale its loss by it."""
    model = mlp()
    optimizer = make(model.parameters(), grad_scaler=torch.amp.GradScaler("cpu", enabled=False))
    assert optimizer.grad_scaler is None
    before = weights(optimizer)

    def closure():
        optimizer.zero_grad()
        loss = regression(model, *batch())()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert any((p != q).any() for p, q in zip(weights(optimizer), before, strict=True))
