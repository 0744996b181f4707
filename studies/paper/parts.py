"""Which runs a table or figure needs, given those that are there: rounds on validation data, then runs on test data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from studies.defaults.contender import Contender
from studies.defaults.networks import Network
from studies.paper.contenders import KINDS, ROUNDS, best, gam, tried
from studies.paper.jobs import FIRST_TUNING_SEED, Job
from studies.paper.networks import NOISE, TABLE1, TRANSFER, TUNED_NOISE
from studies.store import Run

TUNING_SEEDS, SEEDS = 2, 5
RATIOS = (0.05, 0.1, 0.5)  # of the steps, in figure 4; without GAM and with it in every step are in the noise table
RATIO_ALPHAS = (1.0, 2.0, 4.0)  # sparse steps may weigh more (section 5.5)
FIGURE_SEED = 0
PARTS_OF_TRAINING = (0.5, 1.0)  # figure 3: epochs 100 and 200 of 200

Stage = Callable[[Sequence[Run]], list[Job]]  # from all runs of the part so far


def validation(network: Network, contenders: Sequence[Contender]) -> list[Job]:
    """Seed by seed, so that what disturbs the machine meets all contenders."""
    seeds = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + TUNING_SEEDS)
    return [Job(network.name, contender, seed, "validation") for seed in seeds for contender in contenders]


def picked(network: Network, runs: Sequence[Run]) -> list[Contender]:
    """The best of each kind; a kind of which every contender failed is left out."""
    found = (best(runs, network, kind) for kind in KINDS)
    return [contender for contender in found if contender]


def tuning(networks: Sequence[Network]) -> list[Stage]:
    """The rounds of choosing hyperparameters, each for all networks."""

    def stage(number: int, runs: Sequence[Run]) -> list[Job]:
        return [job for network in networks for job in validation(network, tried(number, network, runs))]

    return [partial(stage, number) for number in range(ROUNDS)]


def table(networks: Sequence[Network], seeds: int = SEEDS) -> list[Stage]:
    """Table 1 or 3: the best of each kind on test data."""

    def final(runs: Sequence[Run]) -> list[Job]:
        return [Job(n.name, c, seed, "test") for seed in range(seeds) for n in networks for c in picked(n, runs)]

    return [*tuning(networks), final]


def noise(seeds: int = SEEDS) -> list[Stage]:
    """Every level of wrong labels with the hyperparameters of one of them."""

    def final(runs: Sequence[Run]) -> list[Job]:
        levels = [(NOISE[data, level], NOISE[data, TUNED_NOISE]) for data, level in NOISE]
        return [Job(n.name, c, seed, "test") for seed in range(seeds) for n, tuned in levels for c in picked(tuned, runs)]

    return [*tuning(tuned_networks()), final]


def tuned_networks() -> list[Network]:
    """Those of the noise table that hyperparameters are chosen on, one for each data set."""
    return [network for (_, level), network in NOISE.items() if level == TUNED_NOISE]


def figure4(seeds: int = SEEDS) -> list[Stage]:
    """GAM in some of the steps, alpha chosen for each ratio; rho as chosen for every step."""

    def sparse(runs: Sequence[Run], network: Network) -> list[Contender]:
        base, sam, plain, both = (best(runs, network, kind) for kind in ("base", "sam", "gam", "sam_gam"))
        tried = []
        for ratio in RATIOS:
            for whole, oracle in ((plain, None), (both, sam)):
                if base and whole:
                    rho, k = whole.options["rho"], round(1 / ratio)
                    tried += [gam(base, rho, alpha, oracle, k) for alpha in RATIO_ALPHAS]
        return tried

    def choice(runs: Sequence[Run]) -> list[Job]:
        return [job for network in tuned_networks() for job in validation(network, sparse(runs, network))]

    def final(runs: Sequence[Run]) -> list[Job]:
        found = [
            (n, best(runs, n, kind, round(1 / r))) for n in tuned_networks() for r in RATIOS for kind in ("gam", "sam_gam")
        ]
        whole = [(network, contender) for network in tuned_networks() for contender in picked(network, runs)]
        return [Job(n.name, c, seed, "test") for seed in range(seeds) for n, c in [*whole, *found] if c]

    return [*tuning(tuned_networks()), choice, final]


def figures(seed: int = FIGURE_SEED) -> list[Stage]:
    """Figures 2, 3 and 5: the conv nets of table 1 at half and at all of their training, as table 1 trains them."""
    networks = [network for network in TABLE1 if "conv net" in network.title]

    def final(runs: Sequence[Run]) -> list[Job]:
        return [
            Job(n.name, c, seed, "figure", part) for n in networks for part in PARTS_OF_TRAINING for c in picked(n, runs)
        ]

    return [*tuning(networks), final]


PARTS: dict[str, Callable[[], list[Stage]]] = {
    "table1": lambda: table(TABLE1),
    "table3": lambda: table(TRANSFER),
    "noise": noise,
    "figure4": figure4,
    "figures": figures,
}
