"""What is compared: for each loss oracle, GAM on every 20th, 10th, 2nd or every step, with several weights alpha."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from examples.digits.methods import UNBOUNDED, Method
from gam_fused.methods import TAKES

GAM = TAKES["finite_difference"]  # rho' stays at its default
RHO = 0.2  # the radius at which GAM, and SAM alone, are at their best here (studies/sweep_digits.py)
RATIOS = (0.05, 0.1, 0.5, 1.0)  # of the steps; and 0, the oracle alone
WINDOW = 20  # steps: a multiple of every interval, so that all windows of one setting hold the same steps

# Sparse GAM steps may weigh more (section 5.5). The upper end is where runs diverge.
ALPHAS: dict[float, tuple[float, ...]] = {
    0.05: (0.5, 1.0, 2.0, 4.0, 8.0, 16.0),
    0.1: (0.5, 1.0, 2.0, 4.0, 8.0, 16.0),
    0.5: (0.5, 1.0, 2.0, 4.0, 8.0),
    1.0: (0.5, 1.0, 2.0, 3.0),
}


@dataclass(frozen=True)
class Oracle:
    """Where h_loss of Algorithm 1 comes from: the loss itself (base SGD), or SAM."""

    label: str
    alone: Method  # ratio 0: the limit of an infinite interval
    name: str  # with GAM: a method of examples/digits/methods.py, and its options
    options: Mapping[str, Any] = field(default_factory=dict)
    plain_passes: int = 1  # gradient passes of a step between GAM steps
    gam_passes: int = 4

    def method(self, ratio: float, alpha: float = GAM.alpha) -> Method:
        """GAM on `ratio` of the steps; ratio 0 is the oracle alone, whatever alpha."""
        if not ratio:
            return self.alone
        return Method(
            self.name, options={**self.options, "rho": RHO, "interval": round(1 / ratio), "alpha": alpha, **UNBOUNDED}
        )

    def passes(self, ratio: float) -> float:
        """Gradient passes per step, on average."""
        return self.plain_passes + ratio * (self.gam_passes - self.plain_passes)


# SAM at two radii. GAM's probe doubles as SAM's ascent when sam_rho = rho', the package's default, which saves a pass but is
# a small radius for SAM; the other is the radius at which SAM alone is at its best here (studies/sweep_digits.py).
ORACLES = {
    "sgd": Oracle("SGD", Method("base"), "finite_difference"),
    "sam": Oracle(f"SAM {GAM.rho_prime:g}", Method("sam", options={"rho": GAM.rho_prime}), "sam_gam", {}, 2, 4),
    "sam_wide": Oracle(f"SAM {RHO:g}", Method("sam", options={"rho": RHO}), "sam_gam", {"sam_rho": RHO}, 2, 5),
}


def swept(oracles: Sequence[str], alphas: Mapping[float, Sequence[float]]) -> list[Method]:
    """Every setting among which alpha is chosen."""
    return [ORACLES[key].method(ratio, alpha) for key in oracles for ratio in RATIOS for alpha in alphas[ratio]]


def ratio_name(ratio: float) -> str:
    """As people say it."""
    return {0.0: "no step", 1.0: "every step"}.get(ratio, f"1/{round(1 / ratio)} of the steps" if ratio else "")
