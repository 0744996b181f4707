"""A tensor of more elements than 32 bits count. Every value is exact in bfloat16, so each is told right from wrong."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gam_fused.backends.operands import Combine, CombinedUpdate, DirectionProducts, Perturb, Restore, SquaredNorm
from gam_fused.backends.tensor_lists import Layout, TensorList
from gam_fused.constants import Algorithm, Column, Control

COUNT = 2**31 + 4099
BYTES = 7 * COUNT  # three tensors, and comparisons of 2^30 elements


def holds(t: Tensor, value: float) -> bool:
    return all(bool((part == value).all()) for part in t.split(2**30))


def check(backend: Any, device: torch.device) -> None:
    """Every kernel, on one tensor of `COUNT` elements."""
    layout = Layout([COUNT], [0], [True])
    theta, backup, ones = (torch.full((COUNT,), v, dtype=torch.bfloat16, device=device) for v in (0.0, 7.0, 1.0))
    partials = torch.zeros(2, 1, dtype=torch.float64, device=device)
    sums = torch.zeros(1, dtype=torch.float64, device=device)
    control = torch.zeros(len(Control), dtype=torch.float64, device=device)
    control[Control.LOSS_SCALE] = 1.0
    row = torch.zeros(1, len(Column), dtype=torch.float64, device=device)
    row[0, Column.RADIUS_0], row[0, Column.DIRECTION_LAST], row[0, Column.LR] = 0.5, 1.0, 0.125
    total = torch.tensor([[4.0], [1.0]], dtype=torch.float64, device=device)
    lists = [TensorList([t]) for t in (theta, backup, ones)]
    shared = {"layout": layout, "theta": lists[0], "coefficients": row, "partials": total, "control": control}

    backend.squared_norm(SquaredNorm(layout=layout, x=lists[2], partials=partials))
    assert abs(partials[0].sum().item() / COUNT - 1) < 1e-12, "squared_norm"
    partials.zero_()
    backend.direction_products(DirectionProducts(layout=layout, last=lists[2], coefficients=row, partials=partials))
    assert abs(partials[0].sum().item() / COUNT - 1) < 1e-12, "direction_products"
    backend.perturb_(Perturb(**shared, x=lists[2], backup=lists[1], realised=sums, ascent=0))
    assert holds(theta, 0.25), "perturb_: theta"
    assert holds(backup, 0.0), "perturb_: backup"
    assert abs(sums.item() / (COUNT / 16) - 1) < 1e-12, "perturb_: realised"
    steps = TensorList([torch.zeros((), device=device)])
    update = {"backup": lists[1], "last": lists[2], "steps": steps, "direction": sums, "algorithm": Algorithm.SGD}
    backend.combined_update_(CombinedUpdate(**shared, **update))
    assert holds(theta, -0.125), "combined_update_"
    row[0, Column.DIRECTION_LAST] = 0.5
    del shared["theta"]
    backend.combine_(Combine(**shared, out=lists[1], last=lists[2], direction=sums))
    assert holds(backup, 0.5), "combine_"
    backend.restore_(Restore(layout=layout, theta=lists[0], backup=lists[2]))
    assert holds(theta, 1.0), "restore_"
