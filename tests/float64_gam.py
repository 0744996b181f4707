"""Gradient norm Aware Minimization in float64, from docs/design.md, section 2. It shares no code with the package.

A loss is a function `loss_fn(params, k)` of the list of all parameters and of the number of the pass (0, 1, ...), so that a
test can let a parameter be missing in one pass. Nothing here is in place and nothing is clever.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

LossFn = Callable[[Sequence[Tensor], int], Tensor]


class Gam64:
    """Whole steps, to compare with.

    Args:
        groups: dicts with `params` (tensors, copied to float64), `rho`, `perturb`, `maximize` and the base's options.
        loss_on_part: the loss of the part of the mini-batch that the flatness term is computed on; None: of all of it.
        base: "sgd", "adam", "adamw", or a function (groups of leaf tensors) -> torch optimizer that is fed d.

    Attributes:
        theta: the parameters, all groups, in order.
        g: the gradient of each pass of the last step; points: the weights at each pass; d, loss, plus, minus: likewise.
    """

    def __init__(
        self,
        groups: Sequence[dict],
        *,
        method: str = "finite_difference",
        base: str | Callable = "sgd",
        rho_prime: float = 0.05,
        alpha: float | tuple[float, float] = 0.3,
        beta: float | tuple[float, float] = 0.5,
        gamma: float = 0.1,
        xi: float = 1e-12,
        adaptive: bool = False,
        oracle: str = "loss",
        sam_rho: float | None = None,
        max_grad_norm: float | None = None,
        max_ratio: float | None = None,
        loss_on_part: LossFn | None = None,
    ):
        self.theta = [p.detach().double().clone() for group in groups for p in group["params"]]
        self.group = [{k: v for k, v in group.items() if k != "params"} for group in groups for _ in group["params"]]
        self.method, self.base, self.rho_prime, self.alpha, self.gamma, self.xi = method, base, rho_prime, alpha, gamma, xi
        self.beta, self.adaptive, self.oracle, self.max_grad_norm = beta, adaptive, oracle, max_grad_norm
        self.sam_rho = rho_prime if sam_rho is None else sam_rho
        self.max_ratio, self.loss_on_part = max_ratio, loss_on_part
        self.state: list[dict] = [{} for _ in self.theta]
        self.torch_base = None
        if callable(base):
            sizes = [len(group["params"]) for group in groups]
            starts = [sum(sizes[:i]) for i in range(len(sizes))]
            self.torch_base = base(
                [
                    {
                        "params": self.theta[s : s + n],
                        **{k: v for k, v in g.items() if k not in ("params", "rho", "perturb")},
                    }
                    for s, n, g in zip(starts, sizes, groups, strict=True)
                ]
            )

    # -- the passes -------------------------------------------------------------------------------------------------

    def gradient(self, loss_fn: LossFn, point: list[Tensor], graph: bool = False) -> tuple[Tensor, list[Tensor]]:
        leaves = [t.detach().clone().requires_grad_() for t in point]
        loss = loss_fn(leaves, len(self.g))
        grads = torch.autograd.grad(loss, leaves, allow_unused=True, create_graph=graph)
        self.seen = [s or g is not None for s, g in zip(self.seen, grads, strict=True)]
        grads = [torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves, strict=True)]
        self.leaves = leaves
        self.points.append([t.detach() for t in point])
        self.g.append([g.detach() for g in grads])
        return loss, grads

    def ascent(self, point: list[Tensor], vector: list[Tensor]) -> list[Tensor]:
        """The unit step of an ascent from `point` along `vector`: zero where a group is not perturbed."""
        scale = [t.abs() if self.adaptive else torch.ones_like(t) for t in point]
        signs = [0.0 if not o.get("perturb", True) else -1.0 if o.get("maximize", False) else 1.0 for o in self.group]
        # what has no gradient stays, though its weight may be infinite
        scale = [torch.where(v == 0, 0.0, w) for v, w in zip(vector, scale, strict=True)]
        norm = math.sqrt(sum(((v * w) ** 2).sum().item() for v, w, s in zip(vector, scale, signs, strict=True) if s))
        return [s * w * w * v / (norm + self.xi or 1.0) for v, w, s in zip(vector, scale, signs, strict=True)]

    def moved(self, point: list[Tensor], vector: list[Tensor], radius: float | None = None) -> list[Tensor]:
        """`point` + radius * unit step; each group's own rho where no radius is given."""
        unit = self.ascent(point, vector)
        return [t + (o["rho"] if radius is None else radius) * u for t, u, o in zip(point, unit, self.group, strict=True)]

    def hessian_product(self, loss_fn: LossFn, point: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """g and Hessian . (unit step along g), both at `point`."""
        _, g = self.gradient(loss_fn, point, graph=True)
        v = self.ascent(point, self.g[-1])
        product = sum((a * b).sum() for a, b in zip(g, v, strict=True))
        if not product.requires_grad:
            return self.g[-1], [torch.zeros_like(t) for t in point]
        hv = torch.autograd.grad(product, self.leaves, allow_unused=True)
        return self.g[-1], [torch.zeros_like(t) if h is None else h for h, t in zip(hv, point, strict=True)]

    def direction(self, loss_fn: LossFn, plain: bool = False) -> list[Tensor]:
        """d at theta. `plain`: what an off step of `interval` takes."""
        self.g, self.points, self.seen = [], [], [False] * len(self.theta)
        theta = self.theta
        if self.method == "exact" and not plain:
            return self.exact(loss_fn)
        _, g0 = self.gradient(loss_fn, theta)
        if plain:
            return self.gradient(loss_fn, self.moved(theta, g0, self.sam_rho))[1] if self.oracle == "sam" else g0
        part = self.loss_on_part
        q0 = g0 if part is None else self.gradient(part, theta)[1]
        flat = loss_fn if part is None else part
        rest = [a - b for a, b in zip(g0, q0, strict=True)]  # of the whole batch's gradient, at every point

        def at(point: list[Tensor]) -> list[Tensor]:
            return [a + r for a, r in zip(self.gradient(flat, point)[1], rest, strict=True)]

        if self.method in ("sam", "gsam"):
            g1 = at(self.moved(theta, q0))
            return g1 if self.method == "sam" else self.surrogate_gap(g0, g1)
        same = self.oracle == "sam" and part is None and self.sam_rho == self.rho_prime
        h_loss = g0
        if self.oracle == "sam" and not same:
            _, h_loss = self.gradient(loss_fn, self.moved(theta, g0, self.sam_rho))
        g1 = at(self.moved(theta, q0, self.rho_prime))
        h_loss = g1 if same else h_loss
        k = [o["rho"] / self.rho_prime for o in self.group]
        if self.method == "gradient_penalty":
            return self.with_flatness(h_loss, [c * (y - x) for c, x, y in zip(k, g0, g1, strict=True)])
        theta2 = self.moved(theta, [b - a for a, b in zip(g0, g1, strict=True)])
        g2 = at(theta2)
        q2 = [a - r for a, r in zip(g2, rest, strict=True)]
        g3 = at(self.moved(theta2, q2, self.rho_prime))
        if self.method == "accelerated":
            return self.projected(g0, g1, g2, g3)
        return self.with_flatness(h_loss, [c * (y - x) for c, x, y in zip(k, g2, g3, strict=True)])

    def exact(self, loss_fn: LossFn) -> list[Tensor]:
        theta, part = self.theta, self.loss_on_part
        g0 = None if part is None else self.gradient(loss_fn, theta)[1]
        q0, f = self.hessian_product(part or loss_fn, theta)
        h_loss = g0 = g0 or q0
        if self.oracle == "sam":
            _, h_loss = self.gradient(loss_fn, self.moved(theta, g0, self.sam_rho))
        _, h = self.hessian_product(part or loss_fn, self.moved(theta, f))
        return self.with_flatness(h_loss, [o["rho"] * b for b, o in zip(h, self.group, strict=True)])

    def with_flatness(self, h_loss: list[Tensor], h_norm: list[Tensor]) -> list[Tensor]:
        """h_loss + alpha' h_norm; alpha' = alpha, or what the bound leaves of it."""
        self.plus, self.minus, self.weight = h_norm, h_loss, self.alpha
        if self.max_ratio is not None:
            h, n = math.sqrt(self.dot(h_loss, h_loss)), math.sqrt(self.dot(h_norm, h_norm)) + self.xi
            self.weight = min(self.alpha, self.max_ratio * h / n) if n else self.alpha
        return [a + self.weight * b for a, b in zip(h_loss, h_norm, strict=True)]

    def surrogate_gap(self, g0: list[Tensor], g1: list[Tensor]) -> list[Tensor]:
        """GSAM: g1 - alpha (g0 minus its projection on g1)."""
        self.plus, self.minus = g1, g0
        square = self.dot(g1, g1)
        s = self.dot(g0, g1) / square if square > 0 else 0.0
        return [b - self.alpha * (a - s * b) for a, b in zip(g0, g1, strict=True)]

    def projected(self, g0: list[Tensor], g1: list[Tensor], g2: list[Tensor], g3: list[Tensor]) -> list[Tensor]:
        """Algorithm 2: h+ - gamma (h- minus its projection on h+)."""
        a1, a3 = self.alpha if isinstance(self.alpha, tuple) else (self.alpha, 1 - self.alpha)
        b0, b2 = self.beta if isinstance(self.beta, tuple) else (self.beta, 1 - self.beta)
        self.plus = [a1 * x + a3 * y for x, y in zip(g1, g3, strict=True)]
        self.minus = [b0 * x + b2 * y for x, y in zip(g0, g2, strict=True)]
        square = self.dot(self.plus, self.plus)
        s = self.dot(self.minus, self.plus) / square if square > 0 else 0.0
        return [p - self.gamma * (m - s * p) for p, m in zip(self.plus, self.minus, strict=True)]

    def dot(self, x: list[Tensor], y: list[Tensor]) -> float:
        """Over the perturbed parameters."""
        pairs = zip(x, y, self.group, strict=True)
        return sum((a * b).sum().item() for a, b, o in pairs if o.get("perturb", True))

    # -- the update -------------------------------------------------------------------------------------------------

    def step(self, loss_fn: LossFn, plain: bool = False) -> float:
        d = self.direction(loss_fn, plain)
        if self.max_grad_norm is not None:
            norm = math.sqrt(sum((x * x).sum().item() for x in d))
            d = [x * min(1.0, self.max_grad_norm / (norm + 1e-6)) for x in d]
        self.d = d
        self.loss = loss_fn(self.points[0], 0).item()
        if self.torch_base is not None:
            for t, x, seen in zip(self.theta, d, self.seen, strict=True):
                t.grad = x if seen else None
            self.torch_base.step()
            return self.loss
        update = sgd if self.base == "sgd" else adam
        self.theta = [
            update(t, x, state, decoupled=self.base == "adamw", **options) if seen else t
            for t, x, state, options, seen in zip(self.theta, d, self.state, self.group, self.seen, strict=True)
        ]
        return self.loss


def sgd(t, d, state, *, lr, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False, maximize=False, **_):
    d = -d if maximize else d
    d = d + weight_decay * t if weight_decay else d
    if momentum:
        state["m"] = momentum * state["m"] + (1 - dampening) * d if "m" in state else d
        d = d + momentum * state["m"] if nesterov else state["m"]
    return t - lr * d


def adam(
    t, d, state, *, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, amsgrad=False, maximize=False, decoupled=False, **_
):
    d = -d if maximize else d
    if weight_decay:
        t, d = (t * (1 - lr * weight_decay), d) if decoupled else (t, d + weight_decay * t)
    n = state["n"] = state.get("n", 0) + 1
    m = state["m"] = betas[0] * state.get("m", 0) + (1 - betas[0]) * d
    v = state["v"] = betas[1] * state.get("v", 0) + (1 - betas[1]) * d * d
    if amsgrad:
        v = state["top"] = torch.maximum(state.get("top", torch.zeros_like(v)), v)
    return t - lr * (m / (1 - betas[0] ** n)) / ((v / (1 - betas[1] ** n)).sqrt() + eps)
