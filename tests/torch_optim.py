"""torch's own descriptions of its optimizers, and FusedGAM's beside them: what the conformance tests run over."""

from __future__ import annotations

import warnings
from functools import partial
from unittest import mock

import pytest
import torch
from gam_helpers import METHODS, SETTINGS
from torch import Tensor, nn

from gam_fused import FusedGAM, FusedSAM

pytest.importorskip("expecttest", reason="torch.testing._internal imports expecttest, which is not installed")
# Importing it adds filters of warnings, and would forbid the rest of the process to set flags of torch.backends.
with warnings.catch_warnings(), mock.patch.object(torch.backends, "disable_global_flags"):
    from torch.testing._internal.common_optimizers import OptimizerInfo, OptimizerInput, optim_db

BACKENDS = ("torch", "cpp")
OF_TORCH = {info.name: info for info in optim_db}
REFUSED = ("LBFGS", "SparseAdam")
# What torch.optim has had between 2.10 and 2.14. One that is new is run too.
NAMES = (
    *("ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "LBFGS", "Muon", "NAdam", "RAdam", "RMSprop"),
    *("Rprop", "SGD", "SparseAdam"),
)


def names_of_torch(but: tuple[str, ...] = ()) -> list:
    """The optimizers of torch.optim as pytest parameters; one that this torch has not is skipped by name."""
    reason = f"torch {torch.__version__} has no OptimizerInfo of "
    return [
        pytest.param(name, marks=pytest.mark.skipif(name not in OF_TORCH, reason=reason + name))
        for name in dict.fromkeys([*NAMES, *OF_TORCH])
        if name not in but
    ]


def _inputs(base: OptimizerInfo, options: dict, device: str, dtype: torch.dtype | None = None) -> list[OptimizerInput]:
    """Those of the base, with what FusedGAM takes beside them."""
    return [
        OptimizerInput(i.params, {**options, "base_optimizer": base.optim_cls, "base_kwargs": i.kwargs}, i.desc)
        for i in base.optim_inputs_func(device, dtype)
    ]


def info_of(method: str, base: str, backend: str) -> OptimizerInfo:
    """FusedGAM, or FusedSAM for its method, with this base."""
    options = {"backend": backend, **SETTINGS[method], **({} if method == "sam" else {"method": method})}
    return OptimizerInfo(
        FusedSAM if method == "sam" else FusedGAM,
        optim_inputs_func=partial(_inputs, OF_TORCH[base], options),
        scheduler_inputs=OF_TORCH[base].scheduler_inputs,
        optim_error_inputs_func=OF_TORCH[base].optim_error_inputs_func,
        supported_impls=(),
        supports_complex=False,
        step_requires_closure=True,
    )


OURS = {
    f"{method}-{base}-{backend}": (method, base, backend)
    for method in METHODS
    for base in ("SGD", "Adam", "AdamW")
    for backend in BACKENDS
}


class Linear:
    """The problem of torch's own tests: least squares in a matrix and a bias, both of two dimensions, as Muon wants them."""

    def __init__(self, dtype: torch.dtype = torch.float32, seed: int = 0):
        g = torch.Generator().manual_seed(seed)
        self.weight, self.bias, self.x = (
            torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in ((10, 5), (10, 1), (5, 3))
        )
        self.weight, self.bias = nn.Parameter(self.weight), nn.Parameter(self.bias)

    @property
    def params(self) -> list[nn.Parameter]:
        return [self.weight, self.bias]

    def __call__(self) -> Tensor:
        return (self.weight @ self.x + self.bias).square().sum()


class Rosenbrock(Linear):
    """Its valley, from where torch starts in it."""

    def __init__(self) -> None:
        self.weight = nn.Parameter(torch.tensor([[1.5, 1.5]], dtype=torch.float32))

    @property
    def params(self) -> list[nn.Parameter]:
        return [self.weight]

    def __call__(self) -> Tensor:
        x, y = self.weight[0]
        return (1 - x) ** 2 + 100 * (y - x**2) ** 2
