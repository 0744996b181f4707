"""What only the Triton backend does on a GPU; what all backends do there is in test_gpu_kernels.py and test_gpu_steps.py."""

from __future__ import annotations

import pytest
import torch
from gam_helpers import batch, mlp, regression, trainer
from on_gpu import CUDA, why_not

from gam_fused import available_backends, backends
from gam_fused.backends import triton
from gam_fused.backends.operands import SquaredNorm
from gam_fused.backends.tensor_lists import Layout, TensorList
from gam_fused.backends.triton import backend

WHY = why_not("triton")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(WHY), reason=WHY or "there")]


def test_auto_takes_a_compiled_backend():
    there = available_backends()
    assert backends.backend_for("auto", CUDA) is (
        backend if there.get("cuda", "not built") else backends._BACKENDS["cuda"][0]
    )


def test_nothing_is_compiled_after_the_first_step():
    def compiled() -> int:
        return sum(len(caches[0]) for kernel in triton.kernels().values() for caches in kernel.device_caches.values())

    model = mlp().to(CUDA)
    x, y = (t.to(CUDA) for t in batch())
    optimizer, closure = trainer("finite_difference", model, regression(model, x, y), backend="triton")
    optimizer.step(closure)
    first = compiled()
    for step in range(99):
        for group in optimizer.param_groups:
            group["lr"], group["rho"] = 1.0 / (step + 2), 0.01 * (step + 1)
        optimizer.step(closure)
    assert compiled() == first > 0


def test_a_gradient_list_that_lies_where_the_last_one_lay_is_not_sent_again(monkeypatch):
    sent = []
    monkeypatch.setattr(triton, "upload", lambda host, device: sent.append(host) or host.to(device))
    layout = Layout([5000], [0], [True])
    gradients = [torch.ones(5000, device=CUDA)]
    partials = torch.zeros(2, 1, dtype=torch.float64, device=CUDA)
    for _ in range(3):
        backend.squared_norm(SquaredNorm(layout=layout, x=TensorList(gradients), partials=partials))
    assert len(sent) == 1
    clones = TensorList([g.clone() for g in gradients])
    backend.squared_norm(SquaredNorm(layout=layout, x=clones, partials=partials))
    assert len(sent) == 2
