"""Whole steps in float64 against `float64_gam`, which shares no code: methods, bases, options, group options, backends."""

from __future__ import annotations

import pytest
import torch
from float64_gam import Gam64
from gam_helpers import METHODS, SETTINGS, backend_params, batch, batch_norm_net, close, functional_loss, make, mlp
from torch import nn

TOLERANCE = 1e-9
INFINITE = float("inf")
SGD, ADAM, ADAMW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
NAMES = {SGD: "sgd", ADAM: "adam", ADAMW: "adamw"}
WITH_ORACLE = ("finite_difference", "exact", "gradient_penalty")
BASES = {
    "sgd": (SGD, {"lr": 0.1, "momentum": 0.0}),
    "sgd-momentum-wd": (SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "sgd-dampening": (SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.4}),
    "sgd-nesterov": (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "sgd-maximize": (SGD, {"lr": 0.01, "momentum": 0.9, "maximize": True, "weight_decay": 0.01}),
    "adam": (ADAM, {"lr": 0.01}),
    "adam-wd-amsgrad": (ADAM, {"lr": 0.01, "weight_decay": 0.01, "amsgrad": True, "betas": (0.8, 0.95), "eps": 1e-6}),
    "adam-maximize": (ADAM, {"lr": 0.01, "maximize": True}),
    "adamw": (ADAMW, {"lr": 0.01, "weight_decay": 0.1}),
    "adamw-amsgrad": (ADAMW, {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True}),
    "adamw-maximize": (ADAMW, {"lr": 0.01, "weight_decay": 0.1, "maximize": True}),
}
OPTIONS = {
    "adaptive": (METHODS, {"adaptive": True}),
    "xi": (METHODS, {"xi": 1e-3}),
    "clipped": (METHODS, {"max_grad_norm": 0.05}),
    "not-clipped": (METHODS, {"max_grad_norm": 100.0}),
    "adaptive-clipped": (METHODS, {"adaptive": True, "max_grad_norm": 0.05}),
    "rho-0": (METHODS, {"rho": 0.0}),
    "oracle": (WITH_ORACLE, {"oracle": "sam", "sam_rho": 0.05, "rho_prime": 0.05}),
    "oracle-default": (("finite_difference", "gradient_penalty"), {"oracle": "sam"}),
    "oracle-own-radius": (WITH_ORACLE, {"oracle": "sam", "sam_rho": 0.2}),
    "oracle-clipped-adaptive": (
        WITH_ORACLE,
        {"oracle": "sam", "sam_rho": 0.2, "max_grad_norm": 0.05, "adaptive": True},
    ),
    "gamma-0": (("accelerated",), {"gamma": 0.0}),
    "pairs": (("accelerated",), {"alpha": (0.4, 0.9), "beta": (1.0, 0.3), "gamma": 0.5}),
    "one-pair": (("accelerated",), {"beta": (0.0, 1.5)}),
    "bound": (WITH_ORACLE, {"max_ratio": 0.02}),
    "bound-too-high-to-matter": (WITH_ORACLE, {"max_ratio": 100.0}),
    "bound-0": (WITH_ORACLE, {"max_ratio": 0.0}),
    "bound-alone": (WITH_ORACLE, {"max_ratio": 0.9, "alpha": INFINITE}),
    "bound-alpha-0": (WITH_ORACLE, {"max_ratio": 0.9, "alpha": 0.0}),
    "bound-xi": (WITH_ORACLE, {"max_ratio": 0.9, "alpha": INFINITE, "xi": 1e-2}),
    "bound-adaptive": (WITH_ORACLE, {"max_ratio": 0.02, "adaptive": True}),
    "bound-clipped": (WITH_ORACLE, {"max_ratio": 0.5, "alpha": INFINITE, "max_grad_norm": 0.05}),
    "bound-oracle": (WITH_ORACLE, {"max_ratio": 0.02, "oracle": "sam", "sam_rho": 0.05, "rho_prime": 0.05}),
    "bound-oracle-own-radius": (WITH_ORACLE, {"max_ratio": 0.5, "alpha": INFINITE, "oracle": "sam", "sam_rho": 0.2}),
    "part": (METHODS, {"flatness_fraction": 0.25}),
    "part-clipped-adaptive": (METHODS, {"flatness_fraction": 0.5, "max_grad_norm": 0.05, "adaptive": True}),
    "part-pairs": (
        ("accelerated",),
        {"flatness_fraction": 0.25, "alpha": (0.4, 0.9), "beta": (1.0, 0.3), "gamma": 0.5},
    ),
    "part-bound": (WITH_ORACLE, {"flatness_fraction": 0.25, "max_ratio": 0.9, "alpha": INFINITE}),
    "part-oracle": (WITH_ORACLE, {"flatness_fraction": 0.25, "oracle": "sam"}),
    "part-bound-oracle": (WITH_ORACLE, {"flatness_fraction": 0.25, "max_ratio": 0.05, "oracle": "sam", "sam_rho": 0.2}),
    "alpha-large": (("finite_difference", "exact", "gradient_penalty", "gsam"), {"alpha": 3.0}),
}


def three_groups(params: list, **common) -> list[dict]:
    """The first layer with its own rho, the last bias not perturbed, the rest at the default."""
    return [
        {"params": params[:1], "rho": 0.25, **common},
        {"params": params[1:-1], **common},
        {"params": params[-1:], "perturb": False, "rho": 0.3, **common},
    ]


class Race:
    """FusedGAM and `Gam64` on the same model, groups and mini-batches."""

    def __init__(
        self, method, base=SGD, base_options=None, backend="auto", groups=None, model=None, x=None, y=None, **options
    ):
        self.model = mlp(torch.float64) if model is None else model
        self.x, self.y = batch(dtype=torch.float64) if x is None else (x, y)
        base_options = {"lr": 0.1, "momentum": 0.9} if base_options is None else base_options
        settings = {**SETTINGS[method], **options}
        params = list(self.model.parameters())
        groups = [{**base_options, **g} for g in ([{"params": params}] if groups is None else groups(params))]
        float64 = {k: v for k, v in settings.items() if k not in ("rho", "interval", "flatness_fraction")}
        self.fraction = settings.get("flatness_fraction", 1.0)
        if self.fraction < 1:
            n = int(len(self.x) * self.fraction)
            float64["loss_on_part"] = functional_loss(self.model, self.x[:n], self.y[:n])
        self.float64 = Gam64([{"rho": settings["rho"], **g} for g in groups], method=method, base=NAMES[base], **float64)
        self.loss_fn = functional_loss(self.model, self.x, self.y)
        self.optimizer = make(groups, base, method, model=self.model, backend=backend, **options)

    def closure(self, batch=None):
        x, y = (self.x, self.y) if batch is None else batch
        return nn.functional.mse_loss(self.model(x), y)

    def step(self):
        return self.optimizer.step(self.closure, (self.x, self.y) if self.fraction < 1 else None)

    def run(self, steps: int = 4) -> None:
        for _ in range(steps):
            loss = self.step()
            expected = self.float64.step(self.loss_fn)
            assert loss.item() == pytest.approx(expected, rel=1e-9)
            close(list(self.model.parameters()), self.float64.theta, TOLERANCE)


def digits_like(seed: int = 3):
    return batch(16, (1, 8, 8), 4, torch.float64, seed)


@pytest.mark.parametrize("backend", backend_params())
@pytest.mark.parametrize(
    ("method", "options"),
    [("accelerated", {"beta": (1.0, 0.5)}), ("exact", {}), ("finite_difference", {})],
    ids=["accelerated_as_the_authors", "exact", "finite_difference"],
)
def test_20_steps_of_a_batch_norm_network(method, options, backend):
    net = nn.Sequential(*list(batch_norm_net(torch.float64))[:-1], nn.Linear(12, 4).double())
    x, y = digits_like()
    base = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}
    race = Race(method, base_options=base, backend=backend, model=net, x=x, y=y, **options)
    race.run(20)
    assert int(net[1].num_batches_tracked) == 20


def test_the_authors_update_is_what_float64_computes():
    """Their released code: h- = g0 + (1 - beta) g2, and the projection removed from it."""
    race = Race("accelerated", beta=(1.0, 0.5))
    race.run(1)
    g0, g1, g2, g3 = (torch.cat([t.flatten() for t in g]) for g in race.float64.g)
    h_plus, h_minus = 0.3 * g1 + 0.7 * g3, g0 + 0.5 * g2
    orthogonal = h_minus - (h_minus @ h_plus) / (h_plus @ h_plus) * h_plus
    d = torch.cat([t.flatten() for t in race.float64.d])
    torch.testing.assert_close(d, h_plus - 0.2 * orthogonal, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("backend", backend_params())
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_bases(method, base, backend):
    kind, base_options = BASES[base]
    Race(method, kind, base_options, backend).run()


@pytest.mark.parametrize("backend", backend_params())
@pytest.mark.parametrize(("method", "option"), [(m, o) for o, (methods, _) in OPTIONS.items() for m in methods])
def test_options(method, option, backend):
    Race(method, backend=backend, **OPTIONS[option][1]).run()


@pytest.mark.parametrize("backend", backend_params())
@pytest.mark.parametrize(
    "options",
    [{}, {"adaptive": True}, {"max_grad_norm": 0.05}, {"flatness_fraction": 0.25}],
    ids=["plain", "adaptive", "clipped", "part"],
)
@pytest.mark.parametrize("base", ["sgd-nesterov", "adamw-amsgrad"])
@pytest.mark.parametrize("method", METHODS)
def test_groups(method, base, options, backend):
    """Own rho per group, and a group that is not perturbed: updated with its cross term."""
    kind, base_options = BASES[base]
    Race(method, kind, base_options, backend, groups=three_groups, **options).run()


@pytest.mark.parametrize("backend", backend_params())
@pytest.mark.parametrize("base", [SGD, ADAM, ADAMW], ids=lambda b: b.__name__)
@pytest.mark.parametrize("method", METHODS)
def test_groups_with_their_own_base_options(method, base, backend):
    own = {
        "weight_decay": 0.2,
        "lr": 0.01,
        **({"momentum": 0.5, "nesterov": True} if base is SGD else {"betas": (0.7, 0.9)}),
    }

    def groups(params):
        return [{"params": params[:2], **own}, {"params": params[2:], "rho": 0.3, "maximize": True}]

    shared = {"lr": 0.05, "weight_decay": 0.0, **({"momentum": 0.9} if base is SGD else {})}
    Race(method, base, shared, backend, groups=groups).run()


@pytest.mark.parametrize("backend", backend_params())
@pytest.mark.parametrize("fraction", [1.0, 0.25])
@pytest.mark.parametrize("method", WITH_ORACLE)
def test_a_bound_with_groups(method, fraction, backend):
    """Norms of the bound are over perturbed parameters; the others are updated with the same weight."""
    race = Race(method, backend=backend, groups=three_groups, max_ratio=0.5, alpha=INFINITE, flatness_fraction=fraction)
    race.run()
    assert race.float64.weight < INFINITE


@pytest.mark.parametrize("method", WITH_ORACLE)
def test_oracle_with_groups(method):
    for sam_rho in (0.05, 0.2):
        Race(method, groups=three_groups, oracle="sam", sam_rho=sam_rho).run()


@pytest.mark.parametrize("oracle", ["loss", "sam"])
def test_off_steps_of_interval(oracle):
    race = Race("finite_difference", interval=3, oracle=oracle)
    for i in range(7):
        race.optimizer.step(race.closure)
        race.float64.step(race.loss_fn, plain=i % 3 != 0)
        close(list(race.model.parameters()), race.float64.theta, TOLERANCE)


@pytest.mark.parametrize("method", METHODS)
def test_every_pass_runs_at_the_point_of_the_paper(method):
    race = Race(method, groups=three_groups)
    inner, seen = race.closure, []

    def watched():
        seen.append([p.detach().clone() for p in race.model.parameters()])
        return inner()

    race.optimizer.step(watched)
    race.float64.step(race.loss_fn)
    assert len(seen) == len(race.float64.points)
    for k, (mine, theirs) in enumerate(zip(seen, race.float64.points, strict=True)):
        close(mine, theirs, 1e-12, f"pass {k}, tensor")


def test_hyperparameters_changed_between_steps():
    race = Race("accelerated")
    for values in ({"rho_prime": 0.02}, {"alpha": 0.9}, {"beta": 0.1}, {"gamma": 0.7}, {"alpha": (1.0, 1.0)}):
        for name, value in values.items():
            setattr(race.optimizer, name, value)
            setattr(race.float64, name, value)
        group = race.optimizer.param_groups[0]
        group["rho"], group["lr"] = group["rho"] * 1.5, group["lr"] * 0.7
        for entry in race.float64.group:
            entry["rho"], entry["lr"] = group["rho"], group["lr"]
        race.run(1)
