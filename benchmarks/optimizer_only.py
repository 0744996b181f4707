"""The optimizer's own arithmetic: steps with a closure that hands over prepared gradients, side by side in one run.

    python -m benchmarks.optimizer_only [--rounds 15] [--out benchmarks/results]

ResNet-50's shapes (161 tensors, 25.6 M elements) and 161 tensors of 64 elements, SGD with momentum. Contestants: the
authors' order of operations per tensor, with and without its zeroing and in-place accumulation, `torch._foreach_*`, and
FusedGAM in each room. Bytes are those of DESIGN's table (N elements, fp32); the yardstick is a triad a <- b + s c of the
same size in the same run, 12 bytes an element. Gradients are handed over as autograd does, nobody else holding them; the
time the closure itself takes to do so is measured apart and named.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import shapes
from benchmarks.baselines import AuthorsGAM, ForeachGAM, Settings
from benchmarks.measure import machine, quantiles, side_by_side
from gam_fused import FusedGAM, available_backends

TRAFFIC = {"accelerated": 27, "finite_difference": 24, "sam": 11}  # reads and writes per element, see README
PASSES = {"accelerated": 4, "finite_difference": 4, "sam": 2}
AUTHORS, AUTHORS_BARE, FOREACH = "authors' order, with zeroing", "authors' order", "torch._foreach_*"


class Gradients:
    """Prepared gradients that are handed over, not lent: after a pass nobody here holds them.

    Args:
        params: what they are gradients of.
        sources: how many different ones are kept to make those of all passes from.
    """

    def __init__(self, params: Sequence[Tensor], sources: int = 4):
        like = params[0]
        generator = torch.Generator(like.device).manual_seed(1)
        options = {"generator": generator, "device": like.device, "dtype": like.dtype}
        self.params = params
        self.sources = [[torch.randn(p.shape, **options) * 1e-2 for p in params] for _ in range(sources)]
        self.ready: list[list[Tensor]] = []

    def prepare(self, passes: int = 4) -> None:
        count = len(self.sources)
        self.ready = [[g * (1.0 + k // count) for g in self.sources[k % count]] for k in range(passes)][::-1]

    def hand_over(self) -> list[Tensor]:
        return self.ready.pop()

    def closure(self) -> float:
        for p, g in zip(self.params, self.ready.pop(), strict=True):
            p.grad = g
        return 0.0

    def closures_alone(self, passes: int) -> None:
        """What a closure costs in itself: setting each gradient and dropping it."""
        for _ in range(passes):
            self.closure()
            for p in self.params:
                p.grad = None


def contestants(sizes: Sequence[tuple[int, ...]], methods: Sequence[str]) -> dict[str, tuple[Callable, Callable]]:
    """Name -> (prepare, run), each on parameters of its own."""
    gradients = Gradients(parameters(sizes))
    s, result = Settings(), {}
    for name, optimizer in (
        (AUTHORS, AuthorsGAM(parameters(sizes), s, zero_and_accumulate=True)),
        (AUTHORS_BARE, AuthorsGAM(parameters(sizes), s)),
        (FOREACH, ForeachGAM(parameters(sizes), s)),
    ):
        result[name] = (gradients.prepare, lambda optimizer=optimizer: optimizer.step(gradients.hand_over))
    result["triad"] = triad(sum(map(math.prod, sizes)))
    for backend, why in available_backends().items():
        if why or backend == "reference":
            continue
        for method in methods:
            result[f"{method}, {backend}"] = fused(parameters(sizes), gradients, method, backend, s)
    result["closure alone"] = (gradients.prepare, lambda: gradients.closures_alone(4))
    return result


def parameters(
    sizes: Sequence[tuple[int, ...]], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    options = {"generator": generator, "device": device, "dtype": dtype}
    return [torch.nn.Parameter(torch.randn(size, **options) * 0.02) for size in sizes]


def fused(
    params: list[Tensor], gradients: Gradients, method: str, backend: str, s: Settings, *, flatten: bool = False
) -> tuple[Callable, Callable]:
    """FusedGAM with the settings of the baselines, as (prepare, run)."""
    options = {"accelerated": {"rho_prime": s.rho_prime, "alpha": s.alpha, "beta": (1.0, 1 - s.beta), "gamma": s.gamma}}
    base = {"lr": s.lr, "momentum": s.momentum, "weight_decay": s.weight_decay, "flatten": flatten}
    optimizer = FusedGAM(
        params, torch.optim.SGD, method=method, rho=s.rho, backend=backend, **options.get(method, {}), **base
    )

    def closure() -> float:
        for p, g in zip(params, gradients.ready.pop(), strict=True):
            p.grad = g
        return 0.0

    return (lambda: gradients.prepare(PASSES[method])), (lambda: optimizer.step(closure))


def triad(elements: int) -> tuple[Callable, Callable]:
    a, b, c = (torch.ones(elements) for _ in range(3))
    return (lambda: None), (lambda: torch.add(b, c, alpha=0.5, out=a))


def run(sizes: Sequence[tuple[int, ...]], rounds: int, label: str) -> dict[str, dict[str, float]]:
    """Quantiles of every contestant, with ratios and, where the traffic is known, the percentage of the triad."""
    elements = sum(map(math.prod, sizes))
    entries = contestants(sizes, ("accelerated", "finite_difference", "sam"))
    with tqdm(total=(rounds + 1) * len(entries), desc=label) as bar:
        times = side_by_side(entries, rounds, bar.update)
    rows = {name: quantiles(seconds) for name, seconds in times.items()}
    overhead = rows["closure alone"]["ms"] / 4
    for name, row in rows.items():
        row["authors_over_this"] = ratio(times[AUTHORS], times[name])
        row["foreach_over_this"] = ratio(times[FOREACH], times[name])
        method = name.split(",")[0]
        if method in TRAFFIC:
            row["ms_without_closure"] = row["ms"] - overhead * PASSES[method]
        if name.endswith(", cpp") and method in TRAFFIC:
            row["GB_per_s"] = 4 * TRAFFIC[method] * elements / row["ms"] / 1e6
            row["percent_of_triad"] = 100 * TRAFFIC[method] / 3 * ratio(times["triad"], times[name])
    rows["triad"]["GB_per_s"] = 12 * elements / rows["triad"]["ms"] / 1e6
    return rows


def ratio(these: list[float], those: list[float]) -> float:
    """The median over rounds of this / that: both of one round, since the machine's speed drifts between rounds."""
    return statistics.median(a / b for a, b in zip(these, those, strict=True))


def table(rows: dict[str, dict[str, float]]) -> str:
    """A Markdown table."""
    lines = [
        "| contestant | ms (20 % .. 80 %) | without the closure's share | authors' / this | foreach / this | of the triad |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        percent = f"{row['percent_of_triad']:.0f} %" if "percent_of_triad" in row else ""
        ratios = f"{row['authors_over_this']:.2f} | {row['foreach_over_this']:.2f}"
        own = f"{row['ms_without_closure']:.2f}" if "ms_without_closure" in row else ""
        spread = f"{row['ms_q20']:.2f} .. {row['ms_q80']:.2f}"
        lines.append(f"| {name} | {row['ms']:.2f} ({spread}) | {own} | {ratios} | {percent} |")
    return "\n".join(lines)


def plot(results: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    """Bars of milliseconds per step, one panel per set of shapes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(6.5 * len(results), 4.2), constrained_layout=True)
    for axis, (title, rows) in zip(axes, results.items(), strict=True):
        shown = {n: r for n, r in rows.items() if n not in ("triad", "closure alone")}
        names = list(shown)[::-1]
        values = [shown[n]["ms"] for n in names]
        spread = [[shown[n]["ms"] - shown[n]["ms_q20"] for n in names], [shown[n]["ms_q80"] - shown[n]["ms"] for n in names]]
        colors = ["#0072b2" if n.endswith("cpp") else "#56b4e9" if n.endswith("torch") else "#999999" for n in names]
        axis.barh(names, values, xerr=spread, color=colors, error_kw={"lw": 1})
        for y, value in enumerate(values):
            axis.text(value * 1.02, y + 0.22, f"{value:.3g}", va="center", fontsize=8)
        axis.set(title=title, xlabel="ms per step, the closure's hand-over included")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    results = {
        "ResNet-50: 161 tensors, 25.6 M": run(shapes.resnet50(), arguments.rounds, "ResNet-50"),
        "161 tensors of 64 elements": run(shapes.tiny(), 20 * arguments.rounds, "tiny"),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    record = {"machine": machine(), "traffic_per_element": TRAFFIC, "results": results}
    (arguments.out / "optimizer_only.json").write_text(json.dumps(record, indent=1) + "\n")
    text = "\n\n".join(f"{title}\n\n{table(rows)}" for title, rows in results.items())
    (arguments.out / "optimizer_only.md").write_text(text + "\n")
    plot(results, arguments.out / "optimizer_only.png")
    print(text)


if __name__ == "__main__":
    main()
