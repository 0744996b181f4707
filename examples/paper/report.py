"""The paper's tables from a folder of runs, with its numbers beside. `python -m examples.paper.report out/paper`."""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from examples.paper.methods import METHODS

Run = dict[str, Any]

TABLES = {
    "cifar": "Table 1: CIFAR from scratch",
    "imagenet": "Table 2: ImageNet from scratch",
    "transfer": "Table 3: finetuning",
}
PLACE = ("task", "dataset", "model", "augmentation")  # a row of the paper's tables; the method is its column
HOW = ("method", "preset", "precision")
OTHER = (*PLACE, *HOW, "ratio", "label_noise", "changed", "set")
HEADER = ("", "runs", "here, %", "paper, %", "agrees", "gain", "paper's", "agrees", "ms per step", "times the base's")


def published() -> dict[tuple[Any, ...], dict[str, Any]]:
    """The paper's cells by place and method: top1 and sd in percent, and top5 and top5_sd in table 2."""
    tasks = dict(enumerate(TABLES, start=1))
    cells = json.loads(Path(__file__).with_name("published.json").read_text())["cells"]
    return {(tasks[c["table"]], *(c.get(name) for name in PLACE[1:]), c["method"]): c for c in cells}


def runs_in(folder: Path) -> list[Run]:
    """The finished runs of a folder and the folders in it, but for those on fake data."""
    runs = [json.loads(path.read_text()) for path in sorted(folder.rglob("*.json"))]
    return [run for run in runs if not run["settings"]["fake"]]


def is_of_the_tables(run: Run) -> bool:
    """GAM in every step, true labels, and all else as the paper has it or the scripts do."""
    s = run["settings"]
    return s["ratio"] == 1 and not s.get("label_noise") and not s["changed"] and not s["set"]


def grouped(runs: Iterable[Run], names: Sequence[str]) -> dict[tuple[Any, ...], list[Run]]:
    """Runs by settings, in the order of the methods."""
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in sorted(runs, key=lambda run: METHODS.index(run["settings"]["method"])):
        values = (run["settings"].get(name) for name in names)
        groups.setdefault(tuple(json.dumps(v) if isinstance(v, dict) else v for v in values), []).append(run)
    return groups


def mean_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; NaN for the latter of one value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def agrees(difference: float, *sds: float) -> str:
    """Whether a difference is at most twice the standard deviations of its terms together; "-" where one is not known."""
    if math.isnan(difference) or any(map(math.isnan, sds)):
        return "-"
    return "yes" if abs(difference) <= 2 * math.hypot(*sds) else "no"


def rows(runs: Iterable[Run], measure: str, best: bool) -> list[dict[str, Any]]:
    """One row per place, method, preset and precision that there are runs of: means, spreads, gains over the base, and
    the same of the paper.

    Args:
        measure: `top1` or `top5`.
        best: of a run, the best of all its evaluations rather than its last.
    """
    value, cells, bases = f"best_{measure}" if best else measure, published(), {}
    sd_name = "sd" if measure == "top1" else f"{measure}_sd"
    found = []
    for key, group in grouped(filter(is_of_the_tables, runs), (*PLACE, *HOW)).items():
        row = {**dict(zip((*PLACE, *HOW), key, strict=True)), "runs": len(group)}
        place, method = key[: len(PLACE)], row["method"]
        mean, sd = mean_sd([run[value] for run in group])
        row |= {"mean": mean, "sd": sd, "step_ms": statistics.median(run["step_ms"] for run in group)}
        cell = cells.get((*place[:2], row["model"].removesuffix("_narrow"), place[3], method), {})
        row |= {"paper": cell.get(measure, math.nan), "paper_sd": cell.get(sd_name, 0.0)}  # table 3 has no spreads
        row["agrees"] = agrees(mean - row["paper"], sd, row["paper_sd"])
        if method == "base":
            bases[place, row["precision"]] = row
        elif base := bases.get((place, row["precision"])):
            gain, paper_gain = mean - base["mean"], row["paper"] - base["paper"]
            row |= {"gain": gain, "paper_gain": paper_gain, "cost": row["step_ms"] / base["step_ms"]}
            row["gain_agrees"] = agrees(gain - paper_gain, sd, base["sd"], row["paper_sd"], base["paper_sd"])
        found.append(row)
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [line(HEADER), line(["---"] * len(HEADER))]
    for row in rows:
        label = [row[name] for name in (*PLACE[1:], *HOW) if row[name]]
        cells = [
            " ".join(label),
            row["runs"],
            spread(row["mean"], row["sd"]),
            spread(row["paper"], row["paper_sd"] or math.nan),
        ]
        cells += [
            row["agrees"],
            number(row.get("gain"), "+.2f"),
            number(row.get("paper_gain"), "+.2f"),
            row.get("gain_agrees", ""),
        ]
        lines.append(line([*cells, number(row["step_ms"], ".1f"), number(row.get("cost"), ".2f")]))
    return "\n".join(lines)


def others(runs: Iterable[Run], best: bool) -> str:
    """Markdown: runs that no table has, as with wrong labels or GAM in some of the steps."""
    lines = [line(["", "runs", "here, %", "ms per step"]), line(["---"] * 4)]
    for values, group in grouped(runs, OTHER).items():
        label = " ".join(
            f"{name} {value}" for name, value in zip(OTHER, values, strict=True) if value not in (None, 0, "{}")
        )
        accuracy = spread(*mean_sd([run["best_top1" if best else "top1"] for run in group]))
        lines.append(line([label, len(group), accuracy, number(statistics.median(run["step_ms"] for run in group), ".1f")]))
    return "\n".join(lines)


def line(cells: Iterable[Any]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def number(value: float | None, form: str) -> str:
    return "" if value is None or math.isnan(value) else format(value, form)


def spread(mean: float, sd: float) -> str:
    return number(mean, ".2f") + (f" +- {sd:.2f}" if not math.isnan(sd) else "")


def report(runs: Sequence[Run], best: bool = False) -> str:
    """All tables that there are runs of."""
    parts = []
    for task, title in TABLES.items():
        own = [run for run in runs if run["settings"]["task"] == task]
        for measure in ("top1", "top5") if task == "imagenet" else ("top1",):
            if found := rows(own, measure, best):
                parts.append(f"## {title}, {measure.replace('top', 'top-')}\n\n{table(found)}")
    if rest := [run for run in runs if not is_of_the_tables(run)]:
        parts.append(f"## Other runs\n\n{others(rest, best)}")
    parts.append(
        "here, paper: mean and standard deviation; gain: over the base. Agrees: the difference is at most twice the "
        "standard deviations together, which takes two runs or more."
    )
    return "\n\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.paper.report", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("out/paper"), help="of runs (out/paper)")
    parser.add_argument(
        "--best", action="store_true", help="the best of a run's evaluations, as the released code prints, not the last"
    )
    options = parser.parse_args(arguments)
    runs = runs_in(options.folder)
    if not runs:
        parser.error(f"there is no finished run in {options.folder}")
    print(report(runs, options.best))


if __name__ == "__main__":
    main()
