"""How close the finite difference comes to the exact Hessian-vector product on ResNet-50, under TF32 and bfloat16.

    python -m benchmarks.gpu.cosine --out folder [--device cuda] [--seconds 300] [--rehearse]

The cosine between (grad L(theta + rho' v/|v|) - grad L(theta)) / rho' and the exact product in full float32, for v the
gradient, on digits of 224 x 224 pixels, before training and after some steps of it. `studies.probe_cosine` has the same for
small networks on the CPU. Writes <machine>.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.gpu.digits import noisy, upscaled
from benchmarks.machine import machine, slug
from benchmarks.networks import classifier
from gam_fused import finite_difference_hvp
from studies.probe_cosine import flat

RHO_PRIMES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
PRECISIONS = ("tf32", "bf16 autocast", "float32")
STAGES = (0, 20, 60)  # steps taken
BATCH, BATCHES, SIDE = 32, 2, 224


def use_tf32(on: bool) -> None:
    """For matrix products and convolutions."""
    torch.backends.cuda.matmul.allow_tf32 = on
    torch.backends.cudnn.allow_tf32 = on


def rows_at(step: int, model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> Iterator[dict[str, Any]]:
    """A row for each precision and rho', over mini-batches."""
    params = list(model.parameters())
    use_tf32(False)
    exact = [_exact(model, params, x, y) for x, y in batches]
    for precision in PRECISIONS:
        use_tf32(precision == "tf32")
        cosines: dict[float, list[float]] = {rho_prime: [] for rho_prime in RHO_PRIMES}
        for (x, y), (vector, product) in zip(batches, exact, strict=True):

            def loss(x: Tensor = x, y: Tensor = y, low: bool = precision == "bf16 autocast") -> Tensor:
                with torch.autocast(x.device.type, torch.bfloat16, enabled=low):
                    return cross_entropy(model(x), y)

            for rho_prime, values in cosines.items():
                found = flat(finite_difference_hvp(loss, params, vector, rho_prime=rho_prime))
                values.append(float(torch.cosine_similarity(found, product, dim=0)))
        for rho_prime, values in cosines.items():
            row = {"step": step, "precision": precision, "rho_prime": rho_prime}
            yield row | {"cosine": statistics.fmean(values), "lowest": min(values)}


def _exact(model: nn.Module, params: list[Tensor], x: Tensor, y: Tensor) -> tuple[list[Tensor], Tensor]:
    """The gradient, and the Hessian's product with it."""
    gradient = torch.autograd.grad(cross_entropy(model(x), y), params, create_graph=True)
    vector = [g.detach() for g in gradient]
    return vector, flat(torch.autograd.grad(gradient, params, grad_outputs=vector))


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.cosine", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", type=torch.device, default="cuda")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which no further stage begins")
    parser.add_argument("--rehearse", action="store_true", help="a tiny network on the CPU")
    options = parser.parse_args(given)
    end = time.monotonic() + options.seconds
    network = "digits" if options.rehearse else "resnet50"
    model = classifier(network, options.device)
    about = machine(options.device)
    found: dict[str, Any] = {"network": network, "batch": BATCH, "batches": BATCHES, "rows": []}
    options.out.mkdir(parents=True, exist_ok=True)
    split = noisy(seed=0)
    images = split.images.to(options.device) if options.rehearse else upscaled(split, split.images, SIDE, options.device)
    data = [(images[i], split.labels[i].to(options.device)) for i in torch.arange(len(images)).split(BATCH)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for step in range(STAGES[1] + 1 if options.rehearse else STAGES[-1] + 1):
        if step in STAGES:
            if time.monotonic() > end:
                break
            found["rows"] += rows_at(step, model, data[:BATCHES])
            (options.out / f"{slug(about)}.json").write_text(json.dumps({"cosine": found}))
            print(f"after {step} steps: {len(found['rows'])} rows", flush=True)
        use_tf32(True)
        x, y = data[step % len(data)]
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()


if __name__ == "__main__":
    main()
