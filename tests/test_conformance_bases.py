"""Every optimizer of torch.optim as the base, in all configurations that torch itself tests.

Updates in numbers are in test_limits.py (foreign bases are fed the direction), test_bases.py (fused updates are torch's) and
test_base_state.py (state dicts of any age); step hooks of bases in test_base_hooks.py.
"""

from __future__ import annotations

import copy
import inspect
import io
import re

import pytest
import torch
from gam_helpers import METHODS, SETTINGS, freeze, same, weights
from torch_optim import BACKENDS, OF_TORCH, REFUSED, Linear, names_of_torch
from torch_optim import NAMES as ALL

from gam_fused import FusedGAM

NAMES = names_of_torch(but=REFUSED)


def configurations(name):
    return [(i.desc, i.kwargs) for i in OF_TORCH[name].optim_inputs_func("cpu", torch.float32)]


def build(problem, name, method, kwargs, backend="auto"):
    kind = OF_TORCH[name].optim_cls
    own = {k: p.default for k, p in inspect.signature(kind).parameters.items() if k in ("alpha", "rho")}  # FusedGAM's too
    base_kwargs = {**own, **copy.deepcopy(kwargs)}
    return FusedGAM(problem.params, kind, method=method, backend=backend, base_kwargs=base_kwargs, **SETTINGS[method])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_loss_goes_where_it_should(name, method, backend):
    for desc, kwargs in configurations(name):
        problem = Linear()
        optimizer = build(problem, name, method, kwargs, backend)
        first = problem().item()
        for _ in range(4):
            optimizer.step(problem)
        risen = problem().item() - first
        assert risen * (1 if kwargs.get("maximize") else -1) > 0, f"{desc}: {risen}"


@pytest.mark.parametrize("name", NAMES)
def test_state_is_what_the_optimizer_alone_has(name):
    """Entries, dtypes, shapes and step counts, after as many steps as the optimizer alone has taken."""
    for desc, kwargs in configurations(name):
        mine, theirs = Linear(), Linear()
        optimizer = build(mine, name, "finite_difference", kwargs)
        plain = OF_TORCH[name].optim_cls(theirs.params, **copy.deepcopy(kwargs))
        for _ in range(3):
            optimizer.step(mine)
            plain.zero_grad()
            theirs().backward()
            plain.step()
        described = [
            {n: {k: _kind(k, v) for k, v in entry.items()} for n, entry in o.state_dict()["state"].items()}
            for o in (optimizer, plain)
        ]
        assert described[0] == described[1], desc


def _kind(key, value):
    if key == "step" or not isinstance(value, torch.Tensor):
        return type(value), float(value) if key == "step" else None
    return value.dtype, value.shape


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_read_with_weights_only_goes_on_with_the_same_bits(name):
    for _, kwargs in configurations(name):
        problem, other = Linear(), Linear(seed=1)
        optimizer = build(problem, name, "finite_difference", kwargs)
        for _ in range(2):
            optimizer.step(problem)
        file = io.BytesIO()
        torch.save({"optimizer": optimizer.state_dict(), "params": problem.params, "x": problem.x}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        second = build(other, name, "finite_difference", kwargs)
        second.load_state_dict(saved["optimizer"])
        other.x = saved["x"]
        with torch.no_grad():
            for p, q in zip(other.params, saved["params"], strict=True):
                p.copy_(q)
        for _ in range(2):
            optimizer.step(problem), second.step(other)
        same(weights(optimizer), weights(second))
        same(freeze(optimizer.state_dict()), freeze(second.state_dict()))


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
@pytest.mark.parametrize("name", NAMES)
def test_what_the_base_refuses_is_refused_in_its_words(name):
    """But for parameters that are listed twice, of which torch warns, and complex ones, of which a step would tell."""
    for error in OF_TORCH[name].optim_error_inputs_func("cpu", torch.float32):
        given = error.optimizer_error_input
        kind, words = error.error_type, error.error_regex
        if kind is UserWarning:
            kind, words = ValueError, "listed twice"
        elif "complex" in given.desc:
            kind, words = TypeError, r"parameter 0 .* is complex; optimize torch.view_as_real\(p\) instead"
        params = [torch.nn.Parameter(torch.zeros(2, 2))] if given.params is None else given.params
        if "complex" in given.desc:
            params = [p.requires_grad_() for p in params]  # frozen, they would be left alone
        with pytest.raises(kind) as raised:
            FusedGAM(params, OF_TORCH[name].optim_cls, base_kwargs=given.kwargs)
        assert re.search(words, str(raised.value)), f"{given.desc}: {raised.value}"


@pytest.mark.parametrize("name", NAMES)
def test_implementations_of_the_base_are_its_own(name):
    """foreach and fused do what they do without FusedSAM; differentiable is refused, since nothing records the update."""
    info = OF_TORCH[name]
    if "differentiable" in info.supported_impls:
        with pytest.raises(ValueError, match="differentiable=True is not supported"):
            build(Linear(), name, "sam", {"differentiable": True})
    on_cpu = [
        f for f in ("foreach", "fused") if f in info.supported_impls and (f == "foreach" or "cpu" in info.supports_fused_on)
    ]
    for options in [{f: value} for f in on_cpu for value in (False, True)]:
        mine, theirs = Linear(torch.float64), Linear(torch.float64)
        optimizer, plain = build(mine, name, "sam", options), info.optim_cls(theirs.params, **options)
        optimizer.param_groups[0][optimizer.rho_key] = 0.0
        for _ in range(3):
            optimizer.step(mine)
            plain.zero_grad()
            theirs().backward()
            plain.step()
        for p, q in zip(mine.params, theirs.params, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14, msg=str(options))


@pytest.mark.parametrize("name", names_of_torch(but=tuple({*ALL, *OF_TORCH} - {*REFUSED})))
@pytest.mark.parametrize("given", ["class", "instance"])
def test_what_cannot_be_a_base_is_refused_in_words(name, given):
    kind = OF_TORCH[name].optim_cls
    params = Linear().params
    with pytest.raises(TypeError, match=f"^{name} .*cannot be a base optimizer; use "):
        FusedGAM(params, kind) if given == "class" else FusedGAM(None, kind(params))
