"""The Markdown of a run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.bench_kernels import YARDSTICK
from benchmarks.bench_training import CONTESTANTS
from benchmarks.contestants import AUTHORS, FOREACH
from benchmarks.report import gpu
from benchmarks.report.ratios import Cell, Ratio, Row, beyond_passes, ms_per_step, ratio, share_of_yardstick

Record = dict[str, Any]


def document(record: Record) -> str:
    """Everything, the one table first."""
    m = record["machine"]
    about = f"{m['cpu']}, {m['cores']} cores, {m['threads']} threads, torch {m['torch']}, Python {m['python']}"
    parts = [
        f"# What GAM costs on {m.get('gpu') or m['cpu']}",
        f"{about}, commit {m['commit']}, {m['date']}. Medians; in brackets the 20 and 80 % quantiles of times, and of ratios"
        " the least and the greatest block.",
        *gpu.device(m),
        *(["Of an unclean tree."] if m["commit"].endswith("+changes") else []),
        *(["## Training steps", summary(record)] if "training" in record["suites"] else []),
    ]
    for title, name, render in (
        ("Training steps in detail", "training", training),
        ("The optimizer alone", "optimizer", optimizer),
        ("Kernels", "kernels", kernels),
        ("Scaling", "scaling", scaling),
    ):
        if name in record["suites"]:
            parts += [f"## {title}", *render(record["suites"][name]["cells"])]
    if "communication" in record:
        parts += ["## Communication under DistributedDataParallel", communication(record["communication"])]
    for title, name, show in gpu.SECTIONS:
        if record.get(name):
            parts += [f"## {title}", table(*show(record[name]))]
    return "\n\n".join([*parts, "## Left out", left_out(record)]) + "\n"


def summary(record: Record) -> str:
    """The one table: a training step's time in base steps, by network; below it what is in it besides its passes."""
    cells = record["suites"].get("training", {}).get("cells", {})
    shown = {name: cell for name, cell in cells.items() if "base" in cell}
    rows = []
    for contestant in CONTESTANTS[1:]:
        if not any(contestant in cell for cell in shown.values()):  # of a run before there was this one
            continue
        entries = []
        for cell in shown.values():
            if contestant not in cell:
                entries.append("")
                continue
            row = cell[contestant]
            times, beyond = ratio(row, cell["base"]), beyond_passes(row)
            parts = [f"{_images_per_s(row):.3g} images/s", f"{_times(times)} x" if times else "", _percent(beyond)]
            entries.append(", ".join(filter(None, parts)))
        rows.append([contestant, *entries])
    note = (
        "Images per second; the time of a step in steps of the base optimizer; by how much it exceeds the forwards and"
        " backwards in it (20 .. 80 %)."
    )
    return f"{table(['', *shown], rows)}\n\n{note}"


def training(cells: dict[str, Cell]) -> Iterable[str]:
    for name, cell in cells.items():
        rows = []
        for contestant, row in cell.items():
            times = ratio(row, cell["base"]) if "base" in cell else None
            beyond = beyond_passes(row)
            memory = f"{row['peak_bytes'] / 2**20:.0f}" if "peak_bytes" in row else ""
            passes = f"{row['passes']:g}" if row.get("passes") else "2, twice differentiated"
            rate = f"{_images_per_s(row):.3g}"
            rows.append([contestant, passes, _ms(row), rate, _times(times), _percent(beyond), memory])
        header = ["", "passes", "ms per step", "images/s", "x the base", "beyond its passes", "peak MiB beyond the weights"]
        yield f"{name}\n\n{table(header, rows)}"


def optimizer(cells: dict[str, Cell]) -> Iterable[str]:
    for name, cell in cells.items():
        rows = []
        for contestant, row in cell.items():
            rivals = [_times(_against(row, cell, by)) for by in (AUTHORS, FOREACH)]
            share = share_of_yardstick(row, cell["triad"]) if "triad" in cell else None
            rows.append([contestant, _ms(row), *rivals, _share(share), *_host(row, cell)])
        header = ["", "ms per step", "authors' order takes", "foreach takes", "of the triad's rate"]
        yield f"{name}\n\n{table([*header, *_host_keys(cell).values()], rows)}"


def kernels(cells: dict[str, Cell]) -> Iterable[str]:
    for name, cell in cells.items():
        rows = []
        for contestant, row in cell.items():
            rate = f"{row['bytes'] / row['ms'] / 1e6:.1f}"
            share = share_of_yardstick(row, cell[YARDSTICK]) if YARDSTICK in cell else None
            rows.append([contestant, _ms(row), rate, _share(share), *_host(row, cell)])
        yield f"{name}\n\n{table(['', 'ms', 'GB/s', 'of the yardstick', *_host_keys(cell).values()], rows)}"


def scaling(cells: dict[str, Cell]) -> Iterable[str]:
    contestants = list(dict.fromkeys(name for cell in cells.values() for name in cell))
    rows = [[name, *(_ms(cell[c]) if c in cell else "" for c in contestants)] for name, cell in cells.items()]
    yield "Milliseconds per step.\n\n" + table(["", *contestants], rows)


def communication(worlds: dict[str, dict[str, Row]]) -> str:
    rows = []
    for world, contestants in worlds.items():
        if "failed" in contestants:
            rows.append([world, f"failed: {contestants['failed']}", "", "", ""])
            continue
        for name, row in contestants.items():
            model = 4 * row["parameters"]
            times = f"{row['bytes'] / model:.3f}"
            rows.append([world, name, str(row["all_reduces"]), f"{row['bytes'] / 2**20:.2f}", times])
    header = ["", "", "all-reduces per step", "MiB", "gradients of the model"]
    return f"{table(header, rows)}\n\nCounted by the profiler on rank 0."


def left_out(record: Record) -> str:
    """What was not measured, and why; and suites that failed."""
    lines = []
    for suite, result in record["suites"].items():
        lines += [f"- {suite}: {result['failed']}"] if result["failed"] else []
        missing: dict[tuple[str, str, int], list[str]] = {}
        for line in result["left_out"]:
            missing.setdefault((line["cell"], line["why"], line["block"]), []).append(line["contestant"])
        groups: dict[tuple[str, str, str], list[int]] = {}
        for (cell, why, block), names in missing.items():
            whole = not any(str(block) in row["blocks"] for row in result["cells"].get(cell, {}).values())
            groups.setdefault((cell, why, "" if whole else "; ".join(sorted(names)) + ": "), []).append(block)
        for (cell, why, names), blocks in groups.items():
            some = f", block {', '.join(str(block + 1) for block in blocks)}" if cell in result["cells"] else ""
            lines.append(f"- {suite}: {cell}{some}: {names}{why}")
    return "\n".join(lines) or "Nothing."


def _against(row: Row, cell: Cell, by: str) -> Ratio | None:
    """How many times as long the same step takes by a baseline."""
    rival = cell.get(f"{row.get('base')}, {row.get('method')}, {by}")
    return ratio(rival, row) if rival else None


def _images_per_s(row: Row) -> float:
    return 1e3 * row["images"] / ms_per_step(row)[0]


def _ms(row: Row) -> str:
    return "{:.3g} ({:.3g} .. {:.3g})".format(*ms_per_step(row))


def _host(row: Row, cell: Cell) -> list[str]:
    """What the host does in it: on a CPU all of it, in so many torch operators; on a GPU it launches kernels and returns."""
    return [_short(row[key]) if key in row else "" for key in _host_keys(cell)]


def _host_keys(cell: Cell) -> dict[str, str]:
    """What is known of a cell's rows, and how it is headed."""
    titles = {"kernels": "kernels", "copies": "copies", "host_ms": "host ms"}
    there = {key: title for key, title in titles.items() if any(key in row for row in cell.values())}
    return there or {"operators": "torch operators"}


def _short(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def _times(found: Ratio | None) -> str:
    return f"{found.value:.2f} ({found.low:.2f} .. {found.high:.2f})" if found else ""


def _percent(found: Ratio | None) -> str:
    return "{:+.1f} % ({:+.1f} .. {:+.1f})".format(*(100 * (x - 1) for x in found)) if found else ""


def _share(found: Ratio | None) -> str:
    return "{:.0f} % ({:.0f} .. {:.0f})".format(*(100 * x for x in found)) if found else ""


def table(header: list[str], rows: list[list[str]]) -> str:
    """As Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))
