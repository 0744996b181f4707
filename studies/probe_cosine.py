"""How long the finite difference's probe should be: `python -m studies.probe_cosine` (about three minutes on two cores).

The cosine between Appendix D's Hessian-vector product, (grad L(theta + rho' v/|v|) - grad L(theta)) / rho', and the exact
one, for v the gradient, over rho', at four stages of training. The exact product under bfloat16 autocast is that of the
float32 loss, so that autocast's rows hold all of its error. float64 tells rounding from the rest: on a ReLU net a short
probe crosses few kinks, whose curvature a gradient difference sees and a second derivative does not, at any precision.
Writes probe_cosine.csv and .png.
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from examples.digits.data import load
from examples.digits.net import conv_net
from gam_fused import finite_difference_hvp
from studies.probe_plot import save
from studies.probe_transformer import PatchTransformer

RHO_PRIMES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
STEPS = 240
STAGES = (0, 24, 120, 240)  # steps taken: 0, 10, 50 and 100 % of training
BATCH = 64
BATCHES = 4  # per stage
PRECISIONS = {
    "fp64": (torch.float64, nullcontext),
    "fp32": (torch.float32, nullcontext),
    "bf16 autocast": (torch.float32, lambda: torch.autocast("cpu", torch.bfloat16)),
}

NETS: dict[str, tuple[Callable[[], nn.Module], Callable[..., torch.optim.Optimizer]]] = {
    "conv net with batch norm": (
        lambda: conv_net(seed=0),
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=5e-4),
    ),
    "transformer": (
        lambda: PatchTransformer(seed=0, width=64, depth=2),
        lambda p: torch.optim.AdamW(p, lr=2e-3),
    ),
}


class Row(NamedTuple):
    """One line of the CSV: a net, a stage, a precision and a rho', cosines over `BATCHES` mini-batches."""

    net: str
    parameters: int
    step: int
    weight_norm: float
    gradient_norm: float
    precision: str
    rho_prime: float
    cosine: float
    lowest_cosine: float


def stages(
    build: Callable[[], nn.Module], optimizer_of: Callable[..., torch.optim.Optimizer]
) -> Iterator[tuple[int, nn.Module]]:
    """Trains on the digits with wrong labels; yields (steps taken, a copy of the net in training mode)."""
    data, model = load(seed=0), build()
    optimizer = optimizer_of(model.parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    random = torch.Generator().manual_seed(0)
    for step in range(STEPS + 1):
        if step in STAGES:
            yield step, copy.deepcopy(model)
        index = torch.randperm(len(data.images), generator=random)[:BATCH]
        optimizer.zero_grad()
        cross_entropy(model(data.images[index]), data.labels[index]).backward()
        optimizer.step()
        schedule.step()


def rows_at(name: str, step: int, model: nn.Module) -> Iterator[Row]:
    """Every precision and rho' at one stage."""
    data = load(seed=0)
    size, length = sum(p.numel() for p in model.parameters()), float(flat(model.parameters()).norm())
    for precision, (dtype, context) in PRECISIONS.items():
        random = torch.Generator().manual_seed(step + 1)
        net = copy.deepcopy(model).to(dtype)
        params = list(net.parameters())
        cosines: dict[float, list[float]] = {rho_prime: [] for rho_prime in RHO_PRIMES}
        norms = []
        for _ in range(BATCHES):
            index = torch.randperm(len(data.images), generator=random)[:BATCH]
            x, y = data.images[index].to(dtype), data.labels[index]

            def loss_fn(net: nn.Module = net, x: Tensor = x, y: Tensor = y, context: Callable[..., Any] = context) -> Tensor:
                with context():
                    logits = net(x)
                return cross_entropy(logits.to(x.dtype), y)

            vector = torch.autograd.grad(loss_fn(), params)  # as a training step has it, in its own precision
            norms.append(float(flat(vector).norm()))
            grads = torch.autograd.grad(cross_entropy(net(x), y), params, create_graph=True)
            exact = flat(torch.autograd.grad(grads, params, grad_outputs=vector))
            for rho_prime, values in cosines.items():
                product = flat(finite_difference_hvp(loss_fn, params, vector, rho_prime=rho_prime))
                values.append(float(torch.cosine_similarity(product, exact, dim=0)))
        for rho_prime, values in cosines.items():
            mean = math.fsum(values) / BATCHES
            yield Row(name, size, step, length, math.fsum(norms) / BATCHES, precision, rho_prime, mean, min(values))


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """One float64 vector."""
    return torch.cat([t.detach().double().reshape(-1) for t in tensors])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m studies.probe_cosine", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    options = parser.parse_args(arguments)
    rows: list[Row] = []
    with sdpa_kernel(SDPBackend.MATH), tqdm(total=len(options.nets) * len(STAGES), unit="stage") as bar:
        # the fused attention kernels have no second derivative to compare with
        for name in options.nets:
            for step, model in stages(*NETS[name]):
                rows += rows_at(name, step, model)
                bar.update()
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "probe_cosine.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        writer.writerows([f"{v:.6g}" if isinstance(v, float) else v for v in row] for row in rows)
    save(rows, options.out / "probe_cosine.png")


if __name__ == "__main__":
    main()
