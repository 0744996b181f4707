"""Whose Lanczos? `python -m studies.eigensolvers` (about ten minutes on two cores).

The largest 1, 10 and 50 eigenvalues of Hessians after training, by `hessian_eigenvalues`, scipy.sparse.linalg.eigsh and
torch.lobpcg, on the same float32 products and at the same tolerance: how many products, how long, how far from the truth.
One net has every eigenvalue twice. The truth is the dense Hessian in float64 of the small nets, and of the others what eigsh
says at a tolerance of 1e-4. A run ends after 500 products. Writes eigensolvers.json and .md.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import scipy
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._pytree import tree_map

from examples.digits.data import load
from examples.digits.machine import machine
from examples.digits.net import conv_net
from gam_fused.flatness import hessian_eigenvalues
from gam_fused.flatness.hessian import Hessian
from gam_fused.flatness.objective import Objective, measured
from gam_fused.flatness.progress import Progress

KS = (1, 10, 50)
TOLERANCE, TRUTH = 1e-3, 1e-4  # the error of an eigenvalue is about the square, over the gap to the next
DENSE = 3000  # parameters of nets whose Hessian is formed
IMAGES = 100  # that the measured loss is of
LIMIT = 500  # products of one run
EPOCHS = 30
Solver = Callable[[Callable[[], Tensor], nn.Module, int, float], tuple[Tensor, int]]


def mlp(*widths: int) -> nn.Sequential:
    """Of tanh, [n, 1, 8, 8] -> [n, 10]."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Flatten()]
    for a, b in zip((64, *widths), (*widths, 10), strict=True):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


class Twice(nn.Module):
    """Two copies of a net, each with the loss to itself: every eigenvalue of the Hessian occurs twice."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.nets = nn.ModuleList([net, copy.deepcopy(net)])

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([net(x) for net in self.nets])


NETS: dict[str, Callable[[], nn.Module]] = {
    "MLP, dense": lambda: mlp(16),
    "MLP, dense, twice": lambda: Twice(mlp(16)),
    "MLP, wide": lambda: mlp(300, 300),
    "conv net of the digits": lambda: conv_net(seed=0),
}


def trained(net: nn.Module, epochs: int) -> Callable[[nn.Module], Tensor]:
    """Trains `net` on the noisy digits by Adam; returns the loss on some of them as a function of a net."""
    data = load(seed=0)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    order = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for index in torch.randperm(len(data.images), generator=order).split(64):
            optimizer.zero_grad()
            _loss(net, data.images[index], data.labels[index]).backward()
            optimizer.step()
    net.eval()
    x, y = data.images[:IMAGES], data.labels[:IMAGES]
    return lambda net: _loss(net, x.to(next(net.parameters()).dtype), y)


def _loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    logits = net(x)
    return cross_entropy(logits, y.repeat(len(logits) // len(y)))


def _counting(counts: list[int]) -> Callable[[int, int], None]:
    def count(done: int, _: int) -> None:
        counts.append(done)
        if done > LIMIT:
            raise RuntimeError(f"not there after {LIMIT} products")

    return count


def ours(loss: Callable[[], Tensor], net: nn.Module, k: int, tolerance: float) -> tuple[Tensor, int]:
    counts = [0]
    values = hessian_eigenvalues(loss, net, k, tolerance=tolerance, progress=_counting(counts))
    return values, counts[-1]


def by_scipy(loss: Callable[[], Tensor], net: nn.Module, k: int, tolerance: float) -> tuple[Tensor, int]:
    def solve(objective: Objective) -> tuple[Tensor, int]:
        counts = [0]
        with Progress(_counting(counts), LIMIT, "") as bar:
            hessian = Hessian(objective, bar)
            kind = str(hessian.dtype).removeprefix("torch.")
            operator = LinearOperator(
                (hessian.size,) * 2, lambda v: (hessian @ torch.from_numpy(v).reshape(-1, 1))[:, 0].numpy(), dtype=kind
            )
            values = eigsh(operator, k, which="LA", tol=tolerance, return_eigenvectors=False, v0=_start(hessian).numpy())
        return torch.from_numpy(values.copy()).double().sort(descending=True).values, counts[-1]

    return measured(loss, net, solve)


def by_lobpcg(loss: Callable[[], Tensor], net: nn.Module, k: int, tolerance: float) -> tuple[Tensor, int]:
    def solve(objective: Objective) -> tuple[Tensor, int]:
        counts = [0]
        with Progress(_counting(counts), LIMIT, "") as bar:
            hessian = Hessian(objective, bar)
            start = torch.stack([_start(hessian, i) for i in range(k)], dim=1)
            with torch.no_grad():
                values = torch.lobpcg(_AsTensor(hessian), k, X=start, niter=LIMIT, tol=tolerance, largest=True)[0]
        return values.double().sort(descending=True).values, counts[-1]

    return measured(loss, net, solve)


SOLVERS: dict[str, Solver] = {"ours": ours, "scipy eigsh": by_scipy, "torch lobpcg": by_lobpcg}


class _AsTensor(Tensor):
    """A Hessian in the shape of a matrix, for a function that takes tensors: it can be multiplied, and no more."""

    _hessian: Hessian
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, hessian: Hessian) -> _AsTensor:
        self = Tensor._make_wrapper_subclass(cls, (hessian.size,) * 2, dtype=hessian.dtype)
        self._hessian = hessian
        return self

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not torch.ops.aten.mm.default:
            raise NotImplementedError(f"{function} of a Hessian")
        with torch.enable_grad():
            return args[0]._hessian @ tree_map(Tensor.detach, args[1])


def _start(hessian: Hessian, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(hessian.size, generator=random, dtype=torch.float64).to(hessian.dtype)


def truth(loss: Callable[[nn.Module], Tensor], net: nn.Module, most: int) -> dict[str, Any]:
    """The largest eigenvalues, and how far two ways to them are apart."""
    size = sum(p.numel() for p in net.parameters())
    if size < DENSE:
        net = copy.deepcopy(net).double()
    first = ours(lambda: loss(net), net, most, TRUTH)[0]
    if size < DENSE:

        def dense(objective: Objective) -> Tensor:
            with Progress(False, 0, "") as bar:
                return torch.linalg.eigvalsh(Hessian(objective, bar) @ torch.eye(size, dtype=torch.float64))

        second = measured(lambda: loss(net), net, dense).flip(0)[:most]
    else:
        second = by_scipy(lambda: loss(net), net, most, TRUTH)[0]
    return {"values": second.tolist(), "apart": float(((first - second) / second).abs().max())}


def one(solver: Solver, loss: Callable[[], Tensor], net: nn.Module, k: int, exact: list[float]) -> dict[str, Any]:
    """Products, seconds and the largest relative error of one run; what went wrong in its place."""
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            values, products = solver(loss, net, k, TOLERANCE)
    except (ArpackNoConvergence, RuntimeError, RuntimeWarning, ValueError) as error:
        return {"failed": str(error).splitlines()[0]}
    seconds = time.perf_counter() - start
    expected = torch.tensor(exact[:k], dtype=torch.float64)
    return {"products": products, "seconds": seconds, "error": float(((values - expected) / expected).abs().max())}


def study(nets: list[str], ks: list[int], rounds: int, epochs: int) -> dict[str, Any]:
    """The document: a row for each net, k and solver; times are the least of `rounds`, in turn."""
    start, rows, truths = machine(), [], {}  # of the code that runs, whatever is committed meanwhile
    for name in nets:
        net = NETS[name]()
        of_net = trained(net, epochs)
        size = sum(p.numel() for p in net.parameters())
        truths[name] = {"parameters": size, **truth(of_net, net, max(ks))}
        for k in ks:
            best: dict[str, dict[str, Any]] = {}
            for _ in range(rounds):
                for solver, function in SOLVERS.items():
                    found = one(function, lambda net=net, of_net=of_net: of_net(net), net, k, truths[name]["values"])
                    known = best.setdefault(solver, found)
                    if found.get("seconds", 0.0) < known.get("seconds", 0.0):
                        best[solver] = found
            rows += [{"net": name, "parameters": size, "k": k, "solver": s, **found} for s, found in best.items()]
            print(table(rows[-len(SOLVERS) :]), flush=True)
    facts = {"scipy": scipy.__version__, "tolerance": TOLERANCE, "rounds": rounds, "epochs": epochs}
    return {"machine": start, **facts, "rows": rows, "truth": truths}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line per net, k and solver."""
    lines = [
        "| network | parameters | k | solver | products | seconds | largest relative error |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        found = r["failed"] + " | |" if "failed" in r else f"{r['products']} | {r['seconds']:.2f} | {r['error']:.1e}"
        lines.append(f"| {r['net']} | {r['parameters']:,} | {r['k']} | {r['solver']} | {found} |")
    return "\n".join(lines)


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m studies.eigensolvers", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--ks", nargs="+", type=int, default=list(KS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    options = parser.parse_args(given)
    document = study(options.nets, options.ks, options.rounds, options.epochs)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "eigensolvers.json").write_text(json.dumps(document, indent=1) + "\n")
    (options.out / "eigensolvers.md").write_text(table(document["rows"]) + "\n")


if __name__ == "__main__":
    main()
