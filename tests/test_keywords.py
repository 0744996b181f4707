"""Whose a keyword is: the base optimizer's, FusedGAM's, or nobody's."""

from __future__ import annotations

import copy
import functools
import inspect
from dataclasses import fields

import pytest
import torch
from gam_helpers import backend_params
from torch.optim import SGD, Adadelta, Adam, AdamW, RMSprop

from gam_fused import FusedGAM, FusedSAM, backends
from gam_fused.methods import METHODS, TAKES
from gam_fused.schedules import ProportionalRho
from gam_fused.settings import OF_METHODS, Settings
from gam_fused.step.method import Coefficients


def params():
    return [torch.nn.Parameter(torch.zeros(2))]


class Lamb(SGD):
    def __init__(self, params, lr=0.1, max_grad_norm=1.0):
        super().__init__(params, lr)


class Passes(RMSprop):
    def __init__(self, params, **keywords):
        super().__init__(params, **keywords)


@pytest.mark.parametrize("backend", backend_params())
@pytest.mark.parametrize("base", [Adam, AdamW])
def test_eps_is_adams(base, backend):
    """As it is set for Gaussian splatting, whose gradients are tiny."""
    p, q = params()[0], params()[0]
    optimizer = FusedGAM([p], base, lr=1.0, eps=1e-15, backend=backend)
    assert optimizer.param_groups[0]["eps"] == 1e-15
    assert optimizer.xi == 1e-12
    optimizer.step(lambda: p.sum() * 1e-10)
    plain = base([q], lr=1.0, eps=1e-15)
    (q.sum() * 1e-10).backward()
    plain.step()
    torch.testing.assert_close(p, q, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize(
    ("cls", "base", "keywords", "name"),
    [
        (FusedGAM, RMSprop, {"alpha": 0.9}, "alpha"),
        (FusedGAM, Passes, {"alpha": 0.9}, "alpha"),
        (FusedGAM, Adadelta, {"rho": 0.05}, "rho"),
        (FusedSAM, Adadelta, {"rho": 0.05}, "rho"),
        (FusedGAM, Lamb, {"max_grad_norm": 0.5}, "max_grad_norm"),
        (FusedGAM, RMSprop, {"alpha": 0.9, "base_kwargs": {"momentum": 0.5}}, "alpha"),
    ],
)
def test_a_keyword_of_both_is_refused_with_the_way_out(cls, base, keywords, name):
    with pytest.raises(TypeError, match=rf"{name}.*base_kwargs=\{{'{name}'"):
        cls(params(), base, **keywords)


def test_the_way_out():
    optimizer = FusedGAM(params(), RMSprop, lr=0.1, alpha=2.0, base_kwargs={"alpha": 0.9})
    assert (optimizer.alpha, optimizer.param_groups[0]["alpha"]) == (2.0, 0.9)
    optimizer = FusedGAM(params(), RMSprop, lr=0.1, base_kwargs={"alpha": 0.9})
    assert (optimizer.alpha, optimizer.param_groups[0]["alpha"]) == (1.0, 0.9)
    optimizer = FusedGAM(params(), functools.partial(RMSprop, alpha=0.8), alpha=2.0)
    assert (optimizer.alpha, optimizer.param_groups[0]["alpha"]) == (2.0, 0.8)
    optimizer = FusedGAM(None, RMSprop(params(), alpha=0.7), alpha=2.0)
    assert (optimizer.alpha, optimizer.param_groups[0]["alpha"]) == (2.0, 0.7)
    optimizer = FusedGAM(params(), lambda ps: RMSprop(ps, alpha=0.6), alpha=2.0)
    assert (optimizer.alpha, optimizer.param_groups[0]["alpha"]) == (2.0, 0.6)


def test_what_the_method_has_no_use_for_is_the_bases():
    optimizer = FusedSAM(params(), RMSprop, alpha=0.9)
    assert (optimizer.alpha, optimizer.param_groups[0]["alpha"]) == (None, 0.9)
    with pytest.raises(ValueError, match="alpha"):
        FusedSAM(params(), SGD, lr=0.1, alpha=0.9)


def test_given_twice():
    with pytest.raises(TypeError, match=r"lr.*twice"):
        FusedGAM(params(), SGD, lr=0.1, base_kwargs={"lr": 0.2})


def test_eps_of_a_base_without_one_says_xi():
    with pytest.raises(TypeError, match="xi"):
        FusedGAM(params(), SGD, lr=0.1, eps=1e-12)


@pytest.mark.parametrize(
    "build",
    [
        lambda ps: FusedGAM(ps, Adadelta, rho=0.25, base_kwargs={"rho": 0.8}),
        lambda ps: FusedGAM(None, Adadelta(ps, rho=0.8), rho=0.25),
        lambda ps: FusedGAM([{"params": ps, "rho": 0.8, "gam_rho": 0.25}], Adadelta),
    ],
    ids=["class", "instance", "group"],
)
def test_a_base_with_a_rho_of_its_own_keeps_it(build):
    """Adadelta's rho is how fast its averages forget, GAM's the radius of a ball."""
    ps = params()
    optimizer = build(ps)
    group = optimizer.param_groups[0]
    assert (group["rho"], group["gam_rho"], optimizer.rho_key) == (0.8, 0.25, "gam_rho")
    optimizer.step(lambda: (ps[0] - 1).square().sum())
    assert optimizer.diagnostics()["perturbation_1"].item() == pytest.approx(0.25, rel=1e-5)
    assert optimizer.diagnostics()["first_order_flatness"] > 0
    saved = optimizer.state_dict()
    group["gam_rho"] = 0.5
    optimizer.load_state_dict(saved)
    group = optimizer.param_groups[0]
    assert (group["rho"], group["gam_rho"]) == (0.8, 0.25)
    ProportionalRho(optimizer, max_rho=0.1)
    assert (group["rho"], group["gam_rho"]) == (0.8, 0.1)
    group["gam_rho"] = -1.0
    with pytest.raises(ValueError, match="gam_rho of group 0"):
        optimizer.step(lambda: ps[0].sum())


def test_adadelta_at_its_defaults_is_not_perturbed_by_0_9():
    optimizer = FusedGAM(params(), Adadelta)
    assert (optimizer.param_groups[0]["rho"], optimizer.param_groups[0]["gam_rho"]) == (0.9, 0.05)


@pytest.mark.parametrize("entry", ["perturb", "gam"])
def test_a_base_with_entries_that_fused_gam_uses(entry):
    class Base(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {entry: 1})

    with pytest.raises(TypeError, match=entry):
        FusedGAM(params(), Base)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("interval", 0),
        ("interval", 1.5),
        ("xi", -1.0),
        ("xi", float("nan")),
        ("sam_rho", float("nan")),
        ("oracle", "both"),
        ("method", "gradient"),
        ("perturb_sync", "some"),
        ("max_grad_norm", -1.0),
    ],
)
def test_attributes_set_to_nonsense_are_refused_by_the_next_step(name, bad):
    p = params()[0]
    optimizer = FusedGAM([p], SGD, lr=0.1, oracle="sam", sam_rho=0.05)
    optimizer.step(lambda: (p - 1).square().sum())
    before, good = p.detach().clone(), getattr(optimizer, name)
    setattr(optimizer, name, bad)
    with pytest.raises((ValueError, TypeError), match=name):
        optimizer.step(lambda: (p - 1).square().sum())
    assert torch.equal(p, before)
    setattr(optimizer, name, good)
    optimizer.step(lambda: (p - 1).square().sum())
    assert not torch.equal(p, before)


def test_every_hyperparameter_is_a_keyword_with_the_same_default_and_an_attribute_that_can_be_set():
    """`Settings` lists them; one that is added there and forgotten in the signature, or vice versa, is told here."""
    keywords = inspect.signature(FusedGAM.__init__).parameters
    others = {"self", "params", "base_optimizer", "model", "generators", "grad_scaler", "base_kwargs", "more_base_kwargs"}
    assert set(keywords) - others == {field.name for field in fields(Settings)}
    optimizer = FusedGAM([torch.zeros(2, requires_grad=True)], torch.optim.SGD, lr=0.1)
    for field in fields(Settings):
        assert keywords[field.name].default == field.default, field.name
        if field.name != "rho":  # an entry of param groups
            before, value = optimizer.settings, object()
            setattr(optimizer, field.name, value)
            assert getattr(optimizer, field.name) is getattr(optimizer.settings, field.name) is value
            optimizer.settings = before


def test_a_method_says_all_that_there_is_to_it():
    for name, method in METHODS.items():
        assert method.name == name
        assert method.takes.rho > 0
        settings = Settings(method=name).resolved(TAKES)
        assert set(method.takes.names) == {n for n in OF_METHODS if getattr(settings, n) is not None}
        assert method.coefficients(settings, 0.1) != Coefficients()


def test_generators_may_come_as_any_iterable():
    generator = torch.Generator()
    optimizer = FusedGAM([torch.zeros(2, requires_grad=True)], lr=0.1, generators=iter([generator]))
    assert optimizer.generators == (generator,)
    optimizer.generators = (g for g in [generator])
    assert optimizer.generators == (generator,)


def test_a_factory_that_takes_all_keywords_may_know_those_of_other_implementations():
    told = {}

    def factory(params, **options):
        told.update(options)
        return SGD(params, lr=options["lr"])

    FusedGAM([torch.zeros(2, requires_grad=True)], factory, lr=0.1, epsilon=1e-6, max_norm=3)
    assert told == {"lr": 0.1, "epsilon": 1e-6, "max_norm": 3}


@pytest.mark.parametrize(("method", "name"), [("gradient_penalty", "rho_prime"), ("gsam", "alpha"), ("accelerated", "beta")])
def test_a_method_that_is_switched_to_names_what_it_lacks(method, name):
    p = torch.zeros(2, requires_grad=True)
    optimizer = FusedGAM([p], lr=0.1, method="finite_difference" if name == "beta" else "sam")
    optimizer.method = method
    with pytest.raises(ValueError, match=rf"(rho_prime|{name}|gamma|alpha)=None, but method='{method}' needs it"):
        optimizer.step(lambda: p.sum())


def test_a_backend_that_is_changed_between_steps_is_the_one_that_runs():
    p = torch.ones(2, requires_grad=True)
    optimizer = FusedGAM([p], lr=0.1, backend="torch")
    optimizer.step(lambda: p.square().sum())
    optimizer.backend = "reference"
    optimizer.step(lambda: p.square().sum())
    assert optimizer.session.plan.blocks[0].kernels is backends._BACKENDS["reference"][0]
    optimizer.backend = "nonsense"
    with pytest.raises(ValueError, match="backend='nonsense'"):
        optimizer.step(lambda: p.square().sum())
    optimizer.backend, optimizer.perturb_sync = "auto", "local"
    with pytest.raises(ValueError, match="DistributedDataParallel"):
        optimizer.step(lambda: p.square().sum())


def test_a_shallow_copy_counts_by_itself():
    p = torch.ones(2, requires_grad=True)
    optimizer = FusedGAM([p], lr=0.1)
    optimizer.step(lambda: p.square().sum())
    other = copy.copy(optimizer)
    other.step(lambda: p.square().sum())
    assert (optimizer.session.steps_taken, other.session.steps_taken) == (1, 2)
    assert other.base_optimizer is optimizer.base_optimizer


def test_a_copy_around_a_base_that_does_not_copy_its_hooks():
    class Wrapper(SGD):
        def __getstate__(self):
            return {name: value for name, value in vars(self).items() if not name.startswith("_optimizer_")}

        def __setstate__(self, state):
            self.__dict__.update(state)

    p = torch.ones(2, requires_grad=True)
    other = copy.deepcopy(FusedGAM([p], Wrapper, lr=0.1))
    q = other.param_groups[0]["params"][0]
    other.step(lambda: q.square().sum())
    assert not torch.equal(p, q)
