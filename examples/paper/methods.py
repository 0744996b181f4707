"""The four columns of the paper's tables, and the hyperparameters that GAM runs at.

A method is `base` (SGD, or AdamW for transformers), `sam`, `gam` or `sam+gam`. A preset says how GAM is computed:

released    Algorithm 2 at the values of the authors' released code, which are of CIFAR and of ResNet and PyramidNet; other
            networks with batch norm take ResNet's. It has no oracle: `gam` only.
algorithm1  Algorithm 1, its Hessian-vector products from differences of gradients. The paper searched rho in 0.05 .. 2 and
            alpha in 0.1 .. 10, and has what it found in an appendix that is not at hand: these values are this package's.
eighth      Algorithm 1 on an eighth of the mini-batch, at 1.5 passes: not the paper's, but what was best in docs/studies.md.
"""

from __future__ import annotations

import math
from argparse import Namespace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from examples.paper.models import TRANSFORMERS
from gam_fused import FusedGAM

METHODS = ("base", "gam", "sam", "sam+gam")
PRESETS = ("released", "algorithm1", "eighth")

BASES: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"momentum": 0.9}),
    "AdamW": (torch.optim.AdamW, {"betas": (0.9, 0.999)}),
}

# The released code computes h- = g0 + (1 - b) g2, where its b is 0.5, 0.3, 0.1 and 0.1.
RELEASED = {
    ("cifar100", "resnet"): {"rho": 0.2, "rho_prime": 0.02, "alpha": 0.6, "beta": (1.0, 0.5), "gamma": 0.03},
    ("cifar100", "pyramidnet"): {"rho": 0.2, "rho_prime": 0.04, "alpha": 0.5, "beta": (1.0, 0.7), "gamma": 0.05},
    ("cifar10", "resnet"): {"rho": 0.2, "rho_prime": 0.03, "alpha": 0.1, "beta": (1.0, 0.9), "gamma": 0.05},
    ("cifar10", "pyramidnet"): {"rho": 0.2, "rho_prime": 0.03, "alpha": 0.1, "beta": (1.0, 0.9), "gamma": 0.03},
}

# Section 5.1, after SAM's own paper; elsewhere the customary 0.05.
SAM_RHO = {"cifar100": 0.1}


def base_of(model: str) -> str:
    return "AdamW" if model in TRANSFORMERS else "SGD"


def preset_of(options: Namespace) -> str | None:
    """The preset that a run uses: `released` for GAM where the released code has values, otherwise `algorithm1`."""
    if options.preset or "gam" not in options.method:
        return options.preset
    released = options.task == "cifar" and options.method == "gam" and options.model not in TRANSFORMERS
    return "released" if released else "algorithm1"


def settings(options: Namespace) -> dict[str, Any]:
    """FusedGAM's arguments for a method on a dataset and a model; {} for the base optimizer alone.

    Raises:
        ValueError: a combination that does not exist.
    """
    sam_rho = SAM_RHO.get(options.dataset, 0.05)
    if "gam" not in options.method and (options.preset or options.ratio != 1):
        raise ValueError(f"--preset and --ratio are for gam and sam+gam, not for {options.method}")
    if options.method == "base":
        if options.set:
            raise ValueError("--set gives arguments to FusedGAM, which --method base does without")
        return {}
    if options.method == "sam":
        return {"method": "sam", "rho": sam_rho, **options.set}
    if not 0 < options.ratio <= 1:
        raise ValueError(f"--ratio {options.ratio:g} must be over 0 and at most 1")
    interval = round(1 / options.ratio)
    if abs(interval * options.ratio - 1) > 0.02:
        raise ValueError(f"--ratio {options.ratio:g} is not every n-th step; the nearest is {1 / interval:.3g}")
    chosen = {**preset(options), "interval": interval}
    if options.method == "sam+gam":
        chosen |= {"oracle": "sam", "rho_prime": sam_rho}  # SAM's gradient is then that of the probe, and costs no pass
    return {**chosen, **options.set}


def preset(options: Namespace) -> dict[str, Any]:
    """What a preset sets."""
    name, transformer = preset_of(options), options.model in TRANSFORMERS
    if name == "released":
        family = "pyramidnet" if options.model.startswith("pyramidnet") else "resnet"
        if options.method == "sam+gam":
            raise ValueError("--preset released has no SAM oracle; give sam+gam another --preset")
        if options.task != "cifar" or transformer:
            raise ValueError(
                f"the released code has no values for {options.model} on {options.dataset}; give another --preset"
            )
        return {"method": "accelerated", **RELEASED[options.dataset, family]}
    radius = {"method": "finite_difference", "rho": 0.05 if transformer else 0.2}
    if name == "eighth":
        return {**radius, "alpha": math.inf, "max_ratio": 0.9, "flatness_fraction": 1 / 8}
    # The paper's sum has no bound. Transformers get one: docs/methods.md.
    return {**radius, "alpha": 1.0, "max_ratio": 0.9 if transformer else None}


def optimizer(options: Namespace, network: nn.Module, scaler: Any) -> Optimizer:
    """The optimizer of a run for `network`, which may be wrapped in DistributedDataParallel."""
    base, arguments = BASES[base_of(options.model)]
    arguments = {**arguments, "lr": options.lr, "weight_decay": options.weight_decay}
    own = settings(options)
    return (
        FusedGAM(network, base, grad_scaler=scaler, **own, **arguments) if own else base(network.parameters(), **arguments)
    )
