"""A short check of one backend against `reference`: whole steps of a small network by every method."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from gam_fused.methods import METHODS
from gam_fused.optimizer import FusedGAM

STEPS = 5


def compare_with_reference(backend: str, device: torch.device) -> str:
    """Train a tiny network for a few steps in `backend` and in `reference`, with every method and fused base.

    Returns:
        "ok, ..." with the largest relative difference of the weights; "FAILED, ..." when it is beyond rounding; "" when the
        backend does not serve the device.
    """
    worst = 0.0
    for method in METHODS:
        for base, options in ((torch.optim.SGD, {"momentum": 0.9}), (torch.optim.AdamW, {})):
            try:
                weights = [_train(name, device, method, base, options) for name in (backend, "reference")]
            except RuntimeError as error:
                if "serves" in str(error):
                    return ""
                raise
            difference = (weights[0] - weights[1]).abs().max() / weights[1].abs().max()
            worst = max(worst, difference.item())
    verdict = "ok" if worst < 1e-9 else "FAILED"
    return f"{verdict}, differs from reference by {worst:.1e} after {STEPS} steps in float64"


def _train(backend: str, device: torch.device, method: str, base: type, options: dict[str, Any]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 5, generator=generator, dtype=torch.float64, device="cpu").to(device)
    model = copy.deepcopy(_model(generator)).to(device)
    optimizer = FusedGAM(model.parameters(), base, method=method, lr=0.01, backend=backend, model=model, **options)
    for _ in range(STEPS):
        optimizer.step(lambda: model(x).square().mean())
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def _model(generator: torch.Generator) -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 8, bias=False), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 3)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64, device="cpu") * 0.3)
    return model
