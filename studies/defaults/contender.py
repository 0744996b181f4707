"""A contender: how a network is trained, and how many gradient passes that takes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from typing import Any

import torch
from torch import nn

from gam_fused import FusedGAM
from gam_fused.methods import TAKES
from studies.defaults.networks import Network

# What is compared: the best of each kind by validation.
KINDS = {
    "base": "base",
    "base_long": "base, twice as long",
    "sam": "SAM",
    "sam_interval": "SAM on some steps",
    "sam_part": "SAM on a part of the batch",
    "sam_small_batch": "SAM at a small batch",
    "m_sam": "m-SAM",
    "gam": "GAM",
    "gam_part": "GAM on a part of the batch",
    "gam_interval": "GAM on some steps, a part of the batch",
    "accelerated": "GAM accelerated",
    "sam_gam": "SAM + GAM",
    "penalty_part": "gradient penalty on a part of the batch",
}
SAM_KINDS = tuple(kind for kind in KINDS if kind in ("m_sam", "sam") or (kind.startswith("sam_") and kind != "sam_gam"))
# And what is reported without any choice: the base optimizer as it is given, the methods with nothing given.
GIVEN = "given"
DEFAULTS = {f"default_{method}": method for method in ("finite_difference", "accelerated", "exact", "sam")}

# Passes with the whole batch, and those on the part of it where there is a part (one more is with the whole batch).
PASSES = {
    "finite_difference": (4, 4),
    "accelerated": (4, 4),
    "sam": (2, 2),
    "gsam": (2, 2),
    "gradient_penalty": (2, 2),
    "exact": (6, 0),  # 2, each with a Hessian-vector product by double backward: about 2 more
}


@dataclass(frozen=True)
class Contender:
    """One way to train.

    Attributes:
        kind: of `KINDS`, `GIVEN` or `DEFAULTS`.
        options: FusedGAM's; empty for the base optimizer alone, and for m-SAM. An infinite alpha is "inf", as in JSON.
        base_options: over those of the network.
        batch_size: None is the network's.
        length: times as many epochs or steps as the network's.
        group: m-SAM's m, how many samples ascend together; its radius is `group_rho`.
    """

    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    base_options: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int | None = None
    length: float = 1.0
    group: int | None = None
    group_rho: float | None = None

    @property
    def key(self) -> str:
        """Equal for equal contenders, also from a record of one."""
        return key_of(asdict(self))

    @property
    def fraction(self) -> float:
        """Of the batch, what the flatness term sees."""
        return float(self.options.get("flatness_fraction", 1.0))

    @property
    def passes(self) -> float:
        """Gradient passes with a whole batch per step, by count, averaged over the steps of an interval."""
        if self.group:
            return 2.0
        if not self.options:
            return 1.0
        whole, part = PASSES[self.options["method"]]
        passes = whole if self.fraction == 1.0 else 1 + part * self.fraction
        probe = self.options.get("rho_prime", TAKES[self.options["method"]].rho_prime)
        if self.options.get("oracle") == "sam" and self.options.get("sam_rho", probe) != probe:
            passes += 1
        interval = self.options.get("interval", 1)
        between = 2.0 if self.options.get("oracle") == "sam" else 1.0
        return (passes + between * (interval - 1)) / interval

    @property
    def calls(self) -> float:
        """Gradient passes of any size per step, averaged over the steps of an interval; m-SAM's in a batch of 64."""
        if self.group:
            return 2 * 64 / self.group
        whole = replace(self, options={**self.options, "flatness_fraction": 1.0} if self.options else {})
        interval = self.options.get("interval", 1)
        return whole.passes + (self.fraction < 1.0) / interval

    @property
    def cost(self) -> float:
        """Passes of the whole training over those of the base: how often each sample is seen does not depend on batches."""
        return self.passes * self.length

    @property
    def label(self) -> str:
        """The options as people write them."""
        named = {"flatness_fraction": "f", "max_ratio": "kappa", "weight_decay": "wd", "group_rho": "rho"}
        options = {k: v for k, v in self.options.items() if k not in ("method", "oracle")} | dict(self.base_options)
        options |= {k: v for k, v in (("batch", self.batch_size), ("m", self.group), ("rho", self.group_rho)) if v}
        if "flatness_fraction" in options:
            options["flatness_fraction"] = Fraction(self.fraction)
        name = f"{DEFAULTS[self.kind]}, defaults" if self.kind in DEFAULTS else KINDS.get(self.kind, "base, as given")
        return ", ".join(
            [name, *(f"{named.get(k, k)} {f'{v:g}' if isinstance(v, float) else v}" for k, v in options.items())]
        )

    def optimizer(self, model: nn.Module, network: Network) -> torch.optim.Optimizer:
        """What steps `model`; for m-SAM, the base optimizer."""
        base_options = {**network.base_options, **self.base_options}
        if not self.options:
            return network.base(model.parameters(), **base_options)
        options: dict[str, Any] = {k: float(v) if v == "inf" else v for k, v in self.options.items()}
        return FusedGAM(model, network.base, **options, **base_options)


def key_of(record: Mapping[str, Any]) -> str:
    """The `key` of the contender that a record (of a run, say) holds the fields of."""
    return json.dumps({name: record[name] for name in FIELDS}, sort_keys=True)


def contender_of(record: Mapping[str, Any]) -> Contender:
    """The contender that a record holds the fields of."""
    return Contender(**{name: record[name] for name in FIELDS})


FIELDS = tuple(Contender.__dataclass_fields__)
