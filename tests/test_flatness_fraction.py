"""The flatness term on a part of the mini-batch: which passes see what, and what a step leaves behind."""

from __future__ import annotations

import pytest
import torch
from gam_helpers import METHODS, PASSES, batch, bits, freeze, make, mixed_net, mlp, regression, same
from torch import nn

from gam_fused import FusedGAM
from gam_fused.integrations import BatchClosure

PART_PASSES = {method: PASSES[method] for method in METHODS}


class Watched:
    """A network, and a closure that notes how many samples each pass sees."""

    def __init__(self, method, model=None, fraction=0.25, **options):
        self.model, self.data = model or mlp(), batch(16)
        self.optimizer = make(
            self.model.parameters(), method=method, model=self.model, flatness_fraction=fraction, **options
        )
        self.seen, self.bad, self.error = [], None, None

    def closure(self, part):
        x, y = part
        self.seen.append(len(x))
        loss = nn.functional.mse_loss(self.model(x), y)
        if self.bad == len(self.seen) - 1:
            if self.error:
                raise self.error
            loss = loss * float("inf")
        return loss

    def step(self):
        return self.optimizer.step(self.closure, self.data)


@pytest.mark.parametrize("method", METHODS)
def test_one_pass_sees_the_whole_batch(method):
    task = Watched(method, interval=2)
    loss = regression(task.model, *task.data)().item()
    assert task.step().item() == pytest.approx(loss, rel=1e-6)
    assert task.seen == [16] + [4] * PART_PASSES[method]
    task.seen.clear()
    task.step()
    assert task.seen == [16], "a step between is a plain one"


@pytest.mark.parametrize("method", [m for m in METHODS if m != "exact"])
def test_the_sharpness_is_that_of_the_part(method):
    task, losses = Watched(method), []
    closure = task.closure

    def noting(part):
        losses.append(closure(part))
        return losses[-1]

    task.closure = noting
    task.step()
    told = task.optimizer.diagnostics()
    assert told["loss"] == losses[0]
    assert told["sharpness"] == losses[2].double() - losses[1].double()


@pytest.mark.parametrize("method", METHODS)
def test_the_whole_batch_may_be_given_as_the_part(method):
    """At fraction 1 `step(closure, batch)` is `step(closure)`, bit for bit."""
    task, twin = Watched(method, fraction=1.0), mlp()
    optimizer = make(twin.parameters(), method=method)
    for _ in range(3):
        task.step()
        optimizer.step(regression(twin, *task.data))
    assert task.seen == [16] * 3 * PASSES[method]
    same(list(map(bits, task.model.parameters())), list(map(bits, twin.parameters())))


@pytest.mark.parametrize("method", METHODS)
def test_buffers_and_random_numbers_are_those_of_the_whole_batch(method):
    task = Watched(method, mixed_net())
    plain = mixed_net()
    torch.manual_seed(5)
    plain(task.data[0])
    expected, draw = freeze(dict(plain.named_buffers())), torch.rand(3)
    torch.manual_seed(5)
    task.step()
    assert torch.equal(torch.rand(3), draw)
    same(freeze(dict(task.model.named_buffers())), expected)


def test_passes_on_the_part_share_their_random_numbers():
    """With dropout, a flatness term of radius 0 is none: q1 = q0, and d is the gradient of the whole batch."""
    for method in ("sam", "gradient_penalty"):
        task, twin = Watched(method, mixed_net(), rho=0.0, momentum=0.0), mixed_net()
        sgd = torch.optim.SGD(twin.parameters(), lr=task.optimizer.param_groups[0]["lr"])
        torch.manual_seed(7)
        task.step()
        torch.manual_seed(7)
        regression(twin, *task.data)().backward()
        sgd.step()
        for p, q in zip(task.model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


EVERY_PASS = [(method, k) for method in METHODS for k in range(1 + PART_PASSES[method])]


@pytest.mark.parametrize("bound", [{}, {"max_ratio": 0.5}], ids=["plain", "bound"])
@pytest.mark.parametrize(("method", "bad"), EVERY_PASS)
def test_what_is_not_finite_in_any_pass_skips_the_step(method, bad, bound):
    if bound and method not in ("finite_difference", "exact", "gradient_penalty"):
        bound = {}
    task = Watched(method, mixed_net(), **bound)
    task.step()
    before = freeze([task.model.state_dict(), task.optimizer.state_dict()["state"]])
    task.seen.clear()
    task.bad = bad
    task.step()
    assert task.optimizer.skipped_steps == 1
    same(freeze([task.model.state_dict(), task.optimizer.state_dict()["state"]]), before)


@pytest.mark.parametrize(("method", "bad"), EVERY_PASS)
def test_an_error_in_any_pass_leaves_everything(method, bad):
    task = Watched(method, mixed_net())
    task.step()
    before = freeze([task.model.state_dict(), task.optimizer.state_dict(), torch.get_rng_state()])
    task.seen.clear()
    task.bad, task.error = bad, KeyError("a bad batch")
    with pytest.raises(KeyError, match="a bad batch"):
        task.step()
    same(freeze([task.model.state_dict(), task.optimizer.state_dict(), torch.get_rng_state()]), before)


@pytest.mark.parametrize("bound", [{}, {"max_ratio": 0.2}], ids=["plain", "bound"])
@pytest.mark.parametrize("missing", ["whole", "part", "perturbed"])
@pytest.mark.parametrize("method", METHODS)
def test_a_gradient_that_is_missing_counts_as_zero(method, missing, bound):
    """A head that only some passes use: as one that all use, times zero in the others."""

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.body, self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x, use_b, zero):
            h = torch.tanh(self.body(x))
            out = self.a(h) + (self.b(h) if use_b else 0 * self.b(h) if zero else 0)
            return out

    bound = bound if method in ("finite_difference", "exact", "gradient_penalty") else {}
    data, nets = batch(16), []
    for zero in (True, False):
        net, calls = Heads().double(), []
        optimizer = make(net.parameters(), method=method, flatness_fraction=0.25, **bound)

        def closure(part, net=net, calls=calls, zero=zero):
            x, y = (t.double() for t in part)
            k = len(calls)
            calls.append(k)
            without = {"whole": k == 0, "part": k == 1, "perturbed": k == 2}[missing]
            return nn.functional.mse_loss(net(x, not without, zero), y)

        for _ in range(2):
            calls.clear()
            optimizer.step(closure, data)
        nets.append(net)
    for p, q in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", [m for m in METHODS if m != "exact"])
def test_low_precision_follows_float32(method, dtype):
    bound = {"max_ratio": 0.5} if method in ("finite_difference", "gradient_penalty") else {}
    data = batch(16)
    moved = []
    for kind in (torch.float32, dtype):
        model = mlp().to(kind)
        before = torch.cat([p.detach().float().flatten() for p in model.parameters()])
        optimizer = make(model.parameters(), method=method, flatness_fraction=0.5, rho=0.3, lr=0.5, momentum=0.0, **bound)
        optimizer.step(lambda b, m=model, k=kind: regression(m, b[0].to(k), b[1].to(k))(), data)
        moved.append(torch.cat([p.detach().float().flatten() for p in model.parameters()]) - before)
    assert torch.cosine_similarity(moved[0], moved[1], dim=0) > 0.98


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.5, float("nan"), float("inf")])
def test_what_is_no_part(fraction):
    with pytest.raises(ValueError, match="flatness_fraction"):
        FusedGAM(mlp(), lr=0.1, flatness_fraction=fraction)


def test_a_part_needs_the_batch():
    model = mlp()
    optimizer = make(model.parameters(), flatness_fraction=0.5)
    before = list(map(bits, model.parameters()))
    with pytest.raises(ValueError, match=r"flatness_fraction=0.5.*optimizer.step\(closure, batch\)"):
        optimizer.step(regression(model, *batch()))
    same(list(map(bits, model.parameters())), before)


def test_a_batch_closure_is_a_closure_with_its_batch():
    data, models = batch(), (mlp(), mlp())
    for model, bound in zip(models, (False, True), strict=True):
        optimizer = make(model.parameters(), flatness_fraction=0.5)
        closure = lambda b, m=model: regression(m, *b)()  # noqa: E731
        optimizer.step(BatchClosure(closure, data)) if bound else optimizer.step(closure, data)
    same(*(list(map(bits, model.parameters())) for model in models))
