"""torch.compile: of the model, of the loss, of the code around the step. Nothing is compiled twice."""

from __future__ import annotations

import pytest
import torch
from gam_helpers import METHODS, batch, make, mixed_net, same, weights
from torch._dynamo.utils import counters

BACKENDS = ["eager", "aot_eager"]  # inductor takes most of a minute on a CPU; it runs on the GPU


@pytest.fixture(autouse=True)
def _nothing_compiled_yet():
    torch._dynamo.reset()
    counters.clear()


def train(closure_factory, method="finite_difference", device="cpu", steps=5, backward=False, around=lambda f: f):
    """Weights after some steps; learning rate, rho and rho_prime are others in each."""
    model = mixed_net().to(device)
    x, y = (t.to(device) for t in batch())
    optimizer = make(model.parameters(), method=method, model=model)
    loss_fn = closure_factory(model)

    def closure():
        loss = loss_fn(x, y)
        if backward:
            loss.backward()
        return loss

    step = around(lambda: optimizer.step(closure))
    torch.manual_seed(2)
    for i in range(steps):
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + i)
        optimizer.param_groups[0]["rho"] = 0.1 * (1 + i)
        if method not in ("sam", "exact"):
            optimizer.rho_prime = 0.05 * (1 + i)
        step()
    return weights(optimizer), list(model.parameters())


def eager(model):
    return lambda x, y: (model(x) - y).square().mean()


def compiled_model(**options):
    return lambda model: eager(torch.compile(model, **options))


def compiled_loss(**options):
    return lambda model: torch.compile(eager(model), **options)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", [m for m in METHODS if m != "exact"])
def test_a_compiled_model_or_loss_is_compiled_once(method, backend, backward):
    expected, _ = train(eager, method)
    for compiled in (compiled_model, compiled_loss):
        torch._dynamo.reset()
        counters.clear()
        same(train(compiled(backend=backend, fullgraph=True), method, backward=backward)[0], expected)
        assert counters["stats"]["unique_graphs"] == 1


def test_exact_differentiates_what_the_eager_backend_compiles():
    """aot_autograd and inductor do not differentiate twice, and say so."""
    same(train(compiled_model(backend="eager"), "exact")[0], train(eager, "exact")[0])
    with pytest.raises(RuntimeError, match="double backward"):
        train(compiled_model(backend="aot_eager"), "exact")


@pytest.mark.parametrize("inside", [eager, compiled_model(backend="eager")])
def test_a_compiled_function_around_the_step(inside):
    expected, _ = train(eager)
    same(train(inside, around=lambda f: torch.compile(f, backend="eager"))[0], expected)


@pytest.mark.parametrize("options", [{}, {"mode": "reduce-overhead"}], ids=str)
@pytest.mark.parametrize("method", ["sam", "finite_difference", "accelerated"])
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_inductor_on_a_gpu(method, options):
    """Without dropout, whose masks inductor draws otherwise. reduce-overhead reuses the memory of gradients."""

    def without_dropout(factory):
        def make_loss(model):
            model[3].p = 0.0
            return factory(model)

        return make_loss

    expected = train(without_dropout(eager), method, "cuda")[1]
    counters.clear()
    actual = train(without_dropout(compiled_model(**options)), method, "cuda")[1]
    assert counters["stats"]["unique_graphs"] == 1
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
