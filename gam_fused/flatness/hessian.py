"""Products of the Hessian with flat vectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gam_fused.flatness.objective import Objective
from gam_fused.flatness.progress import Progress
from gam_fused.flatness.vectors import NotFiniteError, wide


class Hessian:
    """The Hessian at the present weights, as a symmetric operator on flat vectors of all parameters; counts its products.

    Attributes:
        size: N. device, dtype: of the vectors: the first parameter's device; float64 if any parameter is, else float32.
    """

    def __init__(self, loss: Objective, progress: Progress):
        self._params, self._progress = loss.params, progress
        self.size = sum(p.numel() for p in loss.params)
        self.device = loss.params[0].device
        self.dtype = torch.float64 if any(wide(p.dtype) == torch.float64 for p in loss.params) else torch.float32
        self._products = loss.hessian()

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """H V, [N, m] for V [N, m]; one pass over the data for all m.

        Raises:
            ValueError: a product that is not finite.
        """
        parts = [self._parts(v) for v in vectors.unbind(1)]
        columns = [torch.cat([h.to(self.device, self.dtype).reshape(-1) for h in hs]) for hs in self._products(parts)]
        for _ in columns:
            self._progress.advance()
        result = torch.stack(columns, dim=1)
        if not torch.isfinite(result).all():
            raise NotFiniteError(
                "the Hessian-vector product is not finite: the loss has no finite curvature at these weights"
            )
        return result

    def on_device(self, vectors: Tensor) -> Tensor:
        """Numbers that were drawn on the CPU, where and as vectors are."""
        return vectors.to(self.device, self.dtype)

    def _parts(self, vector: Tensor) -> Sequence[Tensor]:
        sizes = [p.numel() for p in self._params]
        return [v.view_as(p).to(p.device) for v, p in zip(vector.split(sizes), self._params, strict=True)]
