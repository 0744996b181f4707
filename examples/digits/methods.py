"""What is compared: each method on each base optimizer. GAM and SAM run at the package's defaults, and at the radius that
is best for this network."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from gam_fused import FusedGAM

BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}),
    "AdamW": (torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 1e-2}),
}

UNBOUNDED = {"max_ratio": None}  # the paper's plain sum, which earlier studies are of
RHO = 0.2  # chosen on validation folds of the training images: studies/results/sweep_digits.csv

# For networks with batch norm: the flatness term of an eighth of the batch, as large as its bound lets it be.
RECIPE = {"rho": RHO, "alpha": math.inf, "max_ratio": 0.9, "flatness_fraction": 1 / 8}

# name: (label after the base optimizer's name, FusedGAM's arguments or None for the base optimizer alone)
METHODS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "base": ("", None),
    "sam": ("SAM", {"method": "sam"}),
    "accelerated": ("GAM accelerated", {"method": "accelerated"}),
    "finite_difference": ("GAM", {"method": "finite_difference"}),
    "exact": ("GAM exact", {"method": "exact"}),
    "sam_gam": ("SAM + GAM", {"method": "finite_difference", "oracle": "sam"}),
    "sam_tuned": (f"SAM, rho {RHO:g}", {"method": "sam", "rho": RHO}),
    "finite_difference_tuned": (f"GAM, rho {RHO:g}", {"method": "finite_difference", "rho": RHO, "max_ratio": None}),
    "finite_difference_part": ("GAM, an eighth of the batch", RECIPE),
}


@dataclass(frozen=True)
class Method:
    """One row of the table: `options` and `base_options` go over the defaults of the method and of the base optimizer."""

    name: str
    base: str = "SGD"
    options: dict[str, Any] = field(default_factory=dict)
    base_options: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        suffix = METHODS[self.name][0]
        return f"{self.base} + {suffix}" if suffix else self.base

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of this row for `model`."""
        base, settings = BASES[self.base]
        settings = {**settings, **self.base_options}
        arguments = METHODS[self.name][1]
        if arguments is None:
            return base(model.parameters(), **settings)
        return FusedGAM(model, base, **{**arguments, **self.options}, **settings)
