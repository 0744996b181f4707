"""SGD, SGD + GAM, SAM and SAM + GAM, and how their hyperparameters are chosen: the paper's grids, a coordinate at a time.

Round 0 tries the learning rate and weight decay of the base optimizer, which all keep. Round 1: rho of SAM, and of GAM at
alpha 1. Round 2: alpha of GAM, and rho of SAM + GAM at alpha 1 and SAM's own rho. Round 3: alpha of SAM + GAM.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import product

from examples.digits.methods import UNBOUNDED
from studies.defaults.choose import groups
from studies.defaults.contender import Contender, contender_of
from studies.defaults.networks import Network
from studies.store import Run

KINDS = {"base": "base", "gam": "base + GAM", "sam": "SAM", "sam_gam": "SAM + GAM"}
ROUNDS = 4
RHOS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)  # section 5.2.1
ALPHAS = (0.1, 0.2, 0.5, 1.0, 2.0, 3.0, 5.0)  # section 5.2.1, which goes on to 10
LR_FACTORS = (0.5, 1.0, 2.0)
WEIGHT_DECAY_FACTORS = (1.0, 10.0)
FIRST_ALPHA = 1.0


def gam(base: Contender, rho: float, alpha: float, sam: Contender | None = None, interval: int = 1) -> Contender:
    """GAM as in Algorithm 1 with the gradients of Appendix D, without a bound; on SAM's loss gradient if `sam` is given."""
    options = {"method": "finite_difference", "rho": rho, "alpha": alpha, **UNBOUNDED}
    options |= {"interval": interval} if interval > 1 else {}
    options |= {"oracle": "sam", "sam_rho": sam.options["rho"]} if sam else {}
    return Contender("sam_gam" if sam else "gam", options, base.base_options)


def tried(number: int, network: Network, runs: Sequence[Run]) -> list[Contender]:
    """What round `number` tries on validation data; `runs` are those of the rounds before."""
    if number == 0:
        lr, decay = (network.base_options[key] for key in ("lr", "weight_decay"))
        options = product(LR_FACTORS, WEIGHT_DECAY_FACTORS)
        return [Contender("base", base_options={"lr": lr * a, "weight_decay": decay * b}) for a, b in options]
    base, sam, plain, both = (best(runs, network, kind) for kind in ("base", "sam", "gam", "sam_gam"))
    if base is None:
        return []
    if number == 1:
        sams = [Contender("sam", {"method": "sam", "rho": rho}, base.base_options) for rho in RHOS]
        return sams + [gam(base, rho, FIRST_ALPHA) for rho in RHOS]
    alphas = [alpha for alpha in ALPHAS if alpha != FIRST_ALPHA]
    if number == 2:
        both_first = [gam(base, rho, FIRST_ALPHA, sam) for rho in RHOS] if sam else []
        return both_first + ([gam(base, plain.options["rho"], alpha) for alpha in alphas] if plain else [])
    return [gam(base, both.options["rho"], alpha, sam) for alpha in alphas] if both else []


def best(runs: Sequence[Run], network: Network, kind: str, interval: int = 1) -> Contender | None:
    """The contender of the best mean accuracy on validation data, of those none of whose runs failed; None without one.

    Of equals the first that was tried: smaller learning rates, radii and alphas.
    """
    found = groups(runs, network.name, "validation").values()
    good = [g for g in found if g[0]["kind"] == kind and g[0]["options"].get("interval", 1) == interval]
    good = [g for g in good if not any(run["failed"] for run in g)]
    chosen = max(good, key=lambda g: statistics.fmean(run["value"] for run in g), default=None)
    return contender_of(chosen[0]) if chosen else None
