"""Lanczos iteration with full reorthogonalisation and thick restarts (Wu & Simon 2000), on any symmetric operator."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Operator(Protocol):
    """A symmetric matrix [N, N] that is known by its products with matrices [N, m]."""

    size: int

    def __matmul__(self, vectors: Tensor) -> Tensor: ...

    def on_device(self, vectors: Tensor) -> Tensor:
        """Numbers drawn on the CPU, with the dtype and on the device of vectors."""


class Krylov:
    """An orthonormal basis of a Krylov space, and the eigenpairs of the operator's projection on it.

    Attributes:
        size: number of basis vectors, at most `capacity`. closed: whether the operator leads nowhere else.
        values: float64 [size] on the CPU, in descending order. vectors: their coefficients in the basis, [size, size].
    """

    def __init__(self, operator: Operator, random: torch.Generator, capacity: int):
        self._operator, self._random, self._capacity = operator, random, capacity
        self.size, self.closed = 0, False
        start = self._operator.on_device(self._normal())
        self._basis = start.new_empty(capacity, operator.size)
        self._projection = torch.zeros(capacity, capacity, dtype=torch.float64, device="cpu")
        self._next = start / start.norm()
        self._residual = 0.0  # norm of what the last product had outside the basis
        self.solve()

    def extend(self) -> None:
        """One product: the basis has one vector more."""
        j = self.size
        self._basis[j] = self._next
        self.size += 1
        image = (self._operator @ self._next.unsqueeze(1)).squeeze(1)
        along, rest = self._split(image)
        along[j] = torch.sum(self._next.double() * image.double())
        self._projection[: j + 1, j] = self._projection[j, : j + 1] = along.cpu()
        self._residual = float(rest.double().norm())
        self.closed = self._residual <= self._rounding(self._projection[: j + 1, : j + 1].abs().max())
        if not self.closed:
            self._next = rest / self._residual

    def solve(self) -> None:
        """Brings `values` and `vectors` up to date."""
        values, vectors = torch.linalg.eigh(self._projection[: self.size, : self.size])
        self.values, self.vectors = values.flip(0), vectors.flip(1)

    def residuals(self) -> Tensor:
        """|H v - lambda v| of each eigenpair, float64 [size]."""
        result: Tensor = self._residual * self.vectors[-1].abs()
        return result

    def is_full(self) -> bool:
        return self.size == self._capacity

    def have_converged(self, k: int, tolerance: float) -> bool:
        """Whether residuals of the `k` largest are below `tolerance` * |lambda|, or as small as rounding lets them be."""
        if self.size < k:
            return False
        bound = (tolerance * self.values[:k].abs()).clamp_min(self._rounding(self.values.abs().max()))
        return bool((self.residuals()[:k] <= bound).all())

    def restart(self, keep: int) -> None:
        """The basis becomes the `keep` eigenvectors of the largest values; it is extended from where it was."""
        turn = self.vectors[:, :keep].T.to(self._basis.device)
        for columns in self._basis.split(1 << 16, dim=1):  # without a second basis; in float64, whatever TF32 is allowed
            columns[:keep] = (turn @ columns[: self.size].double()).to(columns.dtype)
        self._projection.zero_()
        self._projection.diagonal()[:keep] = self.values[:keep]
        self.size = keep

    def start_anew(self) -> None:
        """The next vector is a random one outside the space, so that copies of multiple eigenvalues come in."""
        rest = self._split(self._operator.on_device(self._normal()))[1]
        self._next, self.closed = rest / rest.norm(), False

    def _split(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """Its coefficients in the basis, in float64, and what lies outside."""
        basis = self._basis[: self.size]
        along = torch.zeros(self.size, dtype=torch.float64, device=vector.device)
        for _ in range(2):  # twice is enough: one pass loses orthogonality to rounding
            part = basis @ vector
            along, vector = along + part.double(), vector - part @ basis
        return along, vector

    def _normal(self) -> Tensor:
        return torch.randn(self._operator.size, generator=self._random, dtype=torch.float64, device="cpu")

    def _rounding(self, scale: Tensor) -> float:
        """How large rounding makes a residual of a matrix of this scale."""
        return torch.finfo(self._basis.dtype).eps * float(scale)
