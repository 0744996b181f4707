"""What FusedGAM is measured against: the published algorithms as their authors order them, and with `torch._foreach_*`.

They compute SAM, `accelerated` with beta=(1, 1 - beta) and `finite_difference`, around torch's own SGD or AdamW, and are
checked against FusedGAM by a test. They are written for measuring: no dropout replay, no bit-exact weights, no recovery.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

EPS = 1e-12

BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}),
    "AdamW": (torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 1e-2}),
}


@dataclass
class Settings:
    """Hyperparameters of all contestants; `base` names one of `BASES`, `base_options` go over its settings."""

    base: str = "SGD"
    base_options: dict[str, Any] = field(default_factory=dict)
    rho: float = 0.2
    rho_prime: float = 0.02
    alpha: float = 0.6
    beta: float = 0.5
    gamma: float = 0.03

    def built(self, params: Sequence[Tensor], **implementation: Any) -> torch.optim.Optimizer:
        """The base optimizer in torch's `implementation`: foreach=, fused=."""
        kind, options = BASES[self.base]
        return kind(params, **{**options, **self.base_options, **implementation})


@dataclass
class Authors:
    """SAM (radius `rho`) or GAM (`accelerated`) in the published order of operations, one tensor at a time.

    After each pass the gradient is cloned into the state, norms are taken per tensor and stacked, perturbations are stored
    and taken back by subtraction, and the base optimizer runs in the end: some hundred reads and writes of N elements. The
    closure's gradients are taken as they come; the authors' loop adds them to zeroed ones, which takes longer.
    """

    params: Sequence[Tensor]
    settings: Settings = field(default_factory=Settings)
    method: str = "accelerated"

    def __post_init__(self) -> None:
        self.base = self.settings.built(self.params)  # torch's default: per tensor on a CPU, foreach on a GPU
        self.state: dict[Tensor, dict[str, Tensor]] = {p: {} for p in self.params}

    def _pass(self, gradients: Callable[[], Sequence[Tensor]]) -> None:
        for p, g in zip(self.params, gradients(), strict=True):
            p.grad = g

    def _norm(self, key: str | None = None) -> Tensor:
        tensors = [p.grad if key is None else self.state[p][key] for p in self.params]
        return torch.norm(torch.stack([(1.0 * t).norm(p=2) for t in tensors]), p=2)  # 1.0: |theta| when adaptive

    @torch.no_grad()
    def step(self, gradients: Callable[[], Sequence[Tensor]]) -> None:
        """`gradients()` gives the next pass's gradients; it is called twice for SAM, four times for GAM."""
        if self.method == "sam":
            self._sam(gradients)
        else:
            self._gam(gradients)
        self.base.step()

    def _sam(self, gradients: Callable[[], Sequence[Tensor]]) -> None:
        self._pass(gradients)
        scale = self.settings.rho / (self._norm() + EPS)
        for p in self.params:
            self.state[p]["e_w"] = p.grad * scale
            p.add_(self.state[p]["e_w"])
        self._pass(gradients)
        for p in self.params:
            p.sub_(self.state[p]["e_w"])

    def _gam(self, gradients: Callable[[], Sequence[Tensor]]) -> None:
        s = self.settings
        self._pass(gradients)
        scale = s.rho_prime / (self._norm() + EPS)
        for p in self.params:
            self.state[p]["g_0"] = p.grad.clone()
            self.state[p]["e_w_0"] = p.grad * scale
            p.add_(self.state[p]["e_w_0"])
        self._pass(gradients)
        for p in self.params:
            p.sub_(self.state[p]["e_w_0"])
        for p in self.params:
            self.state[p]["g_1"] = p.grad.clone()
            p.grad.sub_(self.state[p]["g_0"])
        scale = s.rho / (self._norm() + EPS)
        for p in self.params:
            self.state[p]["e_w_1_2"] = p.grad * scale
            p.add_(self.state[p]["e_w_1_2"])
        self._pass(gradients)
        scale = s.rho_prime / (self._norm() + EPS)
        for p in self.params:
            self.state[p]["g_2"] = p.grad.clone()
            e_w = p.grad * scale
            p.add_(e_w)
            self.state[p]["e_w_1_2"].add_(e_w)
        self._pass(gradients)
        self._decompose()
        for p in self.params:
            p.sub_(self.state[p]["e_w_1_2"])

    def _decompose(self) -> None:
        """p.grad <- h+ - gamma (h- minus its projection on h+)."""
        s = self.settings
        inner = torch.zeros((), dtype=self.params[0].dtype, device=self.params[0].device)
        for p in self.params:
            self.state[p]["h_minus"] = self.state[p]["g_0"] + (1 - s.beta) * self.state[p]["g_2"]
            p.grad.copy_(s.alpha * self.state[p]["g_1"] + (1 - s.alpha) * p.grad.clone())
            inner += torch.sum(self.state[p]["h_minus"] * p.grad)
        plus, minus = self._norm(), self._norm("h_minus")
        cosine = inner / (plus * minus + EPS)
        for p in self.params:
            vertical = self.state[p]["h_minus"] - cosine * minus * p.grad / (plus + EPS)
            p.grad.add_(vertical, alpha=-s.gamma)


@dataclass
class Foreach:
    """The same arithmetic with `torch._foreach_*`: backups instead of subtraction, gradients taken, no clones.

    Args:
        method: "sam", "finite_difference" or "accelerated".
    """

    params: Sequence[Tensor]
    settings: Settings = field(default_factory=Settings)
    method: str = "accelerated"

    def __post_init__(self) -> None:
        self.params = list(self.params)
        self.base = self.settings.built(self.params, foreach=True)
        self.backup = [torch.empty_like(p) for p in self.params]

    @torch.no_grad()
    def step(self, gradients: Callable[[], Sequence[Tensor]]) -> None:
        """`gradients()` gives the next pass's gradients; it is called twice for SAM, four times for the others."""
        torch._foreach_copy_(self.backup, self.params)
        direction = self._sam(gradients) if self.method == "sam" else self._gam(gradients)
        torch._foreach_copy_(self.params, self.backup)
        for p, d in zip(self.params, direction, strict=True):
            p.grad = d
        self.base.step()
        self.base.zero_grad()

    def _sam(self, gradients: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
        self._ascend(self._take(gradients), self.settings.rho)
        return self._take(gradients)

    def _gam(self, gradients: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
        s = self.settings
        g0 = self._take(gradients)
        self._ascend(g0, s.rho_prime)
        g1 = self._take(gradients)
        difference = torch._foreach_sub(g1, g0)
        if self.method == "finite_difference":
            del g1
        torch._foreach_mul_(difference, s.rho / (_norm(difference) + EPS))
        torch._foreach_copy_(self.params, self.backup)
        torch._foreach_add_(self.params, difference)
        del difference
        g2 = self._take(gradients)
        self._ascend(g2, s.rho_prime)
        if self.method == "finite_difference":
            torch._foreach_add_(g0, g2, alpha=-s.alpha * s.rho / s.rho_prime)
            del g2
            torch._foreach_add_(g0, self._take(gradients), alpha=s.alpha * s.rho / s.rho_prime)
            return g0
        torch._foreach_add_(g0, g2, alpha=1 - s.beta)
        del g2
        return self._decompose(g0, g1, self._take(gradients))

    def _take(self, gradients: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
        """The next pass's gradients, by way of `p.grad`, where a backward leaves them."""
        for p, g in zip(self.params, gradients(), strict=True):
            p.grad = g
        taken = [p.grad for p in self.params]
        for p in self.params:
            p.grad = None
        return taken

    def _ascend(self, gradient: Sequence[Tensor], radius: float) -> None:
        torch._foreach_add_(self.params, torch._foreach_mul(gradient, radius / (_norm(gradient) + EPS)))

    def _decompose(self, h_minus: list[Tensor], g1: list[Tensor], g3: list[Tensor]) -> list[Tensor]:
        """h+ - gamma (h- minus its projection on h+), in the place of g3."""
        s = self.settings
        torch._foreach_mul_(g3, 1 - s.alpha)
        torch._foreach_add_(g3, g1, alpha=s.alpha)
        products = torch._foreach_mul(h_minus, g3)
        projection = torch.stack([t.sum() for t in products]).sum() / _norm(g3) ** 2
        torch._foreach_mul_(g3, 1 + s.gamma * projection)
        torch._foreach_add_(g3, h_minus, alpha=-s.gamma)
        return g3


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(tensors)).norm()
