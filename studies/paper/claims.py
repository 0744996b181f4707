"""What the paper claims, one by one, beside what was found here."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from studies.interval.estimates import Estimate, part_kept
from studies.paper.networks import NOISE, NOISE_LEVELS, TABLE1, TRANSFER
from studies.paper.parts import RATIOS, tuned_networks
from studies.paper.tables import accuracies, difference, verdict, with_both
from studies.store import Run

PUBLISHED = Path(__file__).parents[2] / "examples" / "paper" / "published.json"
NAMES = {"base": "SGD", "gam": "SGD + GAM", "sam": "SAM", "sam_gam": "SAM + GAM"}
CLAIMED = (("gam", "base"), ("sam_gam", "sam"), ("sam", "base"), ("gam", "sam"))


class Claim(NamedTuple):
    """A line of the table: where the paper says what, its number, the number here, and whether they agree."""

    source: str
    text: str
    paper: str
    here: str
    verdict: str


@lru_cache(maxsize=1)
def _published() -> dict[int, list[dict[str, float]]]:
    """The accuracies of each table of the paper by method, in percent: a dict for each model, augmentation and data set."""
    cells: dict[int, dict[Any, dict[str, float]]] = {}
    for cell in json.loads(PUBLISHED.read_text())["cells"]:
        key = tuple(cell.get(name) for name in ("dataset", "model", "augmentation"))
        cells.setdefault(cell["table"], {}).setdefault(key, {})[cell["method"].replace("+", "_")] = cell["top1"]
    return {table: list(found.values()) for table, found in cells.items()}


def published_gain(table: int, kind: str, other: str) -> float:
    """Mean over the cells of a table of the paper of kind - other, in points."""
    return statistics.fmean(cell[kind] - cell[other] for cell in _published()[table])


def points(estimate: Estimate | None) -> str:
    """A difference of accuracies in points, with its interval."""
    if estimate is None or math.isnan(estimate["value"]):
        return "-"
    value, low, high = (100 * estimate[key] for key in ("value", "low", "high"))
    return f"{value:+.1f}" if math.isnan(low) else f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def of_tables(parts: Mapping[str, Sequence[Run]]) -> list[Claim]:
    """Tables 1 and 3: mean differences over the networks."""
    result = []
    for part, table, networks in (("table1", 1, TABLE1), ("table3", 3, TRANSFER)):
        if part in parts:
            for kind, other in CLAIMED:
                found = difference(parts[part], networks, kind, other)
                text = f"{NAMES[kind]} above {NAMES[other]}".replace("SGD", "SGD" if table == 1 else "base")
                count = len(with_both(parts[part], networks, kind, other))
                text += f" (on {count} of {len(networks)} networks)" if count < len(networks) else ""
                paper = f"{published_gain(table, kind, other):+.1f}"
                result.append(Claim(f"table {table}", text, paper, points(found), verdict(found)))
    return result


def of_noise(parts: Mapping[str, Sequence[Run]]) -> list[Claim]:
    """Appendix C.2: GAM is robust to wrong labels. The text at hand has no numbers of it."""
    result = []
    for level in NOISE_LEVELS if "noise" in parts else ():
        networks = [network for (_, its), network in NOISE.items() if its == level]
        for kind, other in CLAIMED[:2]:
            found = difference(parts["noise"], networks, kind, other)
            text = f"{NAMES[kind]} above {NAMES[other]}, {100 * level:.0f} % wrong labels"
            result.append(Claim("appendix C.2", text, "above", points(found), verdict(found)))
    return result


def of_figure4(parts: Mapping[str, Sequence[Run]]) -> list[Claim]:
    """Section 5.5: GAM in a tenth of the steps is similar to GAM in every step."""
    result = []
    for network in tuned_networks() if "figure4" in parts else ():
        for kind, other in CLAIMED[:2]:
            alone, full = (accuracies(parts["figure4"], network, name) for name in (other, kind))
            tenth = accuracies(parts["figure4"], network, kind, round(1 / RATIOS[1]))
            if not (alone and full and tenth):
                continue
            kept = part_kept(tenth, alone, full)
            text = f"{NAMES[kind]} on 1/10 of the steps keeps most of the gain, {network.title}"
            if kept is None:
                result.append(Claim("figure 4", text, "similar", "no gain to keep a part of", "undecided"))
                continue
            here = f"{100 * kept['value']:.0f} % [{100 * kept['low']:.0f}, {100 * kept['high']:.0f}]"
            agrees = "agrees" if kept["low"] > 0.5 else "disagrees" if kept["high"] < 0.5 else "undecided"
            result.append(Claim("figure 4", text, "similar", here, agrees))
    return result


def of_figures(parts: Mapping[str, Sequence[Run]]) -> list[Claim]:
    """Figures 2, 3 and 5, of one seed: no intervals."""
    result = []
    done = {(r["network"], r["kind"], r["part"]): r for r in parts.get("figures", ()) if r["split"] == "figure"}
    for name in dict.fromkeys(key[0] for key in done):
        title = name.split(",")[0]
        end = {kind: done[name, kind, 1.0] for kind in NAMES if (name, kind, 1.0) in done}
        if "base" in end and end["base"].get("minima"):
            minima = end["base"]["minima"]
            share = 100 * sum(n > 1 for n in minima) / len(minima)
            text = f"more than one local minimum in most directions, {title}"
            agrees = "agrees" if share > 50 else "disagrees"
            result.append(Claim("figure 2", text, "most", f"{share:.0f} % of {len(minima)} directions", agrees))
        for kind, other in CLAIMED[:2]:
            for measure, words in (
                ("eigenvalue", "largest eigenvalue"),
                ("trace", "trace"),
                ("rise", "rise of the landscape"),
            ):
                if kind in end and other in end:
                    result.append(_lower(words, end[kind], end[other], measure, title))
    return result


def rise(record: Mapping[str, Any]) -> float:
    """Mean over the landscape of the loss above that at its centre; NaN where it was not measured or not finite."""
    if "landscape" not in record:
        return math.nan
    rows = record["landscape"]
    middle = len(rows) // 2
    return statistics.fmean(value for row in rows for value in row) - rows[middle][middle]


def _lower(words: str, these: Mapping[str, Any], those: Mapping[str, Any], measure: str, title: str) -> Claim:
    a, b = (rise(r) if measure == "rise" else r[measure] for r in (these, those))
    text = f"{words} lower with {NAMES[these['kind']]} than with {NAMES[those['kind']]}, {title}"
    agrees = "agrees" if a < b else "disagrees" if b <= a else "undecided"
    return Claim("figure 5" if measure == "rise" else "figure 3", text, "lower", f"{a:.3g} against {b:.3g}", agrees)


def all_claims(parts: Mapping[str, Sequence[Run]]) -> list[Claim]:
    """In the order of the paper."""
    return [*of_tables(parts), *of_noise(parts), *of_figures(parts), *of_figure4(parts)]
