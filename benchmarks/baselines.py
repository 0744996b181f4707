"""What FusedGAM is measured against: the published algorithm as its authors order it, and with `torch._foreach_*`.

Both compute `accelerated` with beta=(1, 1 - beta) and SGD with momentum, and are checked against FusedGAM by a test. They
are written for measuring: no dropout replay, no bit-exact weights, no recovery.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

EPS = 1e-12


@dataclass
class Settings:
    """Hyperparameters of both baselines."""

    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    rho: float = 0.2
    rho_prime: float = 0.02
    alpha: float = 0.6
    beta: float = 0.5
    gamma: float = 0.03


@dataclass
class AuthorsGAM:
    """The published order of operations, one tensor at a time.

    After each pass the gradient is cloned into the state, norms are taken per tensor and stacked, perturbations are stored
    and taken back by subtraction, and the base optimizer runs in the end: 103 reads and writes of N elements in all.

    Args:
        zero_and_accumulate: start each pass from zeroed gradients that autograd would add to, as the authors' loop does;
            otherwise the closure's gradients are taken as they come.
    """

    params: Sequence[Tensor]
    settings: Settings = field(default_factory=Settings)
    zero_and_accumulate: bool = False

    def __post_init__(self) -> None:
        s = self.settings
        self.base = torch.optim.SGD(
            self.params, lr=s.lr, momentum=s.momentum, weight_decay=s.weight_decay, foreach=False, fused=False
        )
        self.state: dict[Tensor, dict[str, Tensor]] = {p: {} for p in self.params}
        if self.zero_and_accumulate:
            for p in self.params:
                p.grad = torch.zeros_like(p)

    def _pass(self, gradients: Callable[[], Sequence[Tensor]]) -> None:
        if not self.zero_and_accumulate:
            for p, g in zip(self.params, gradients(), strict=True):
                p.grad = g
            return
        for p in self.params:
            p.grad.zero_()
        for p, g in zip(self.params, gradients(), strict=True):
            p.grad.add_(g)

    def _norm(self, key: str | None = None) -> Tensor:
        tensors = [p.grad if key is None else self.state[p][key] for p in self.params]
        return torch.norm(torch.stack([(1.0 * t).norm(p=2) for t in tensors]), p=2)  # 1.0: |theta| when adaptive

    @torch.no_grad()
    def step(self, gradients: Callable[[], Sequence[Tensor]]) -> None:
        """`gradients()` gives the next pass's gradients; it is called four times."""
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
        self.base.step()

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
class ForeachGAM:
    """The same arithmetic with `torch._foreach_*`: backups instead of subtraction, gradients taken, no clones."""

    params: Sequence[Tensor]
    settings: Settings = field(default_factory=Settings)

    def __post_init__(self) -> None:
        s = self.settings
        self.params = list(self.params)
        self.base = torch.optim.SGD(self.params, lr=s.lr, momentum=s.momentum, weight_decay=s.weight_decay, foreach=True)
        self.backup = [torch.empty_like(p) for p in self.params]

    @torch.no_grad()
    def step(self, gradients: Callable[[], Sequence[Tensor]]) -> None:
        """`gradients()` gives the next pass's gradients; it is called four times."""
        s = self.settings
        torch._foreach_copy_(self.backup, self.params)
        g0 = list(gradients())
        torch._foreach_add_(self.params, torch._foreach_mul(g0, s.rho_prime / (_norm(g0) + EPS)))
        g1 = list(gradients())
        difference = torch._foreach_sub(g1, g0)
        torch._foreach_mul_(difference, s.rho / (_norm(difference) + EPS))
        torch._foreach_copy_(self.params, self.backup)
        torch._foreach_add_(self.params, difference)
        del difference
        g2 = list(gradients())
        torch._foreach_add_(self.params, torch._foreach_mul(g2, s.rho_prime / (_norm(g2) + EPS)))
        torch._foreach_add_(g0, g2, alpha=1 - s.beta)
        del g2
        g3 = list(gradients())
        torch._foreach_mul_(g3, 1 - s.alpha)
        torch._foreach_add_(g3, g1, alpha=s.alpha)
        squared = _norm(g3) ** 2
        products = torch._foreach_mul(g0, g3)
        s_coefficient = torch.stack([t.sum() for t in products]).sum() / squared
        torch._foreach_mul_(g3, 1 + s.gamma * s_coefficient)
        torch._foreach_add_(g3, g0, alpha=-s.gamma)
        torch._foreach_copy_(self.params, self.backup)
        for p, d in zip(self.params, g3, strict=True):
            p.grad = d
        self.base.step()
        self.base.zero_grad()


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(tensors)).norm()
