"""The torch backend's two ways through a kernel: in stretches with scalars read, and in vectors with scalars not read."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, SHAPES, Problem, assert_as_precise_as_torch, assert_same_bits, run_combined_update, run_perturb
from gam_helpers import METHODS, make
from test_kernels import ADAM, KERNELS, SGD, torch_error

from gam_fused.backends import batches, foreach, reference
from gam_fused.backends.math import lists as foreach_lists
from gam_fused.constants import Control, Flag

KINDS = ["chunk edges", "empty tensors", "misaligned", "transposed", "0-dim"]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture
def as_on_a_device(monkeypatch):
    """The backend behaves as where the host must not wait for numbers, though tensors are on the CPU."""
    monkeypatch.setattr(foreach_lists, "on_host", lambda t: False)


def check(kernel: str, kind: str, dtype: torch.dtype, allowed: dict, **options) -> None:
    actual = KERNELS[kernel](foreach, Problem(kind, dtype, dtype, **options))
    assert_as_precise_as_torch(
        actual, KERNELS[kernel](reference, Problem(kind, torch.float64, dtype, **options)), allowed, dtype
    )


@dtypes
@pytest.mark.parametrize("kind", KINDS)
def test_scalars_that_the_host_does_not_read(monkeypatch, kind, dtype):
    allowed = {kernel: torch_error(kernel, kind, dtype, ()) for kernel in KERNELS}
    monkeypatch.setattr(foreach_lists, "on_host", lambda t: False)
    for kernel in KERNELS:
        check(kernel, kind, dtype, allowed[kernel])


@pytest.mark.parametrize("steps", [0.0, 3.0])
@pytest.mark.parametrize(
    ("kernel", "flags"),
    [
        ("sgd momentum", Flag.NESTEROV | Flag.MAXIMIZE),
        ("adam", Flag.AMSGRAD),
        ("adam", Flag.DECOUPLED),
        ("sgd", Flag.MAXIMIZE),
    ],
)
def test_flags_that_the_host_does_not_read(monkeypatch, kernel, flags, steps):
    options = {"flags": flags, "steps_so_far": steps}
    allowed = torch_error(kernel, "chunk edges", torch.float32, tuple(options.items()))
    monkeypatch.setattr(foreach_lists, "on_host", lambda t: False)
    check(kernel, "chunk edges", torch.float32, allowed, **options)


@dtypes
@pytest.mark.parametrize("algorithm", [SGD, ADAM])
def test_an_update_is_skipped_without_asking_the_host(as_on_a_device, algorithm, dtype):
    problem = Problem("chunk edges", dtype, dtype, flags=Flag.AMSGRAD, steps_so_far=3.0)
    result = run_combined_update(foreach, problem, algorithm, g1=False, totals=(float("nan"), 1.0))
    assert_same_bits(result, {"theta": problem.values(5), "state1": problem.values(7)})
    assert {float(s) for s in result["steps"].tensors} == {3.0}
    assert result["direction"] == 0
    assert result["control"][Control.SKIPPED] == 1


@dtypes
def test_an_ascent_stays_without_asking_the_host(as_on_a_device, dtype):
    problem = Problem("chunk edges", dtype, dtype)
    result = run_perturb(foreach, problem, ascent=1, total=float("inf"))
    assert_same_bits({"theta": result["theta"]}, {"theta": problem.values(5)})
    assert result["realised"] == 0


@pytest.mark.parametrize("device", [False, True], ids=["host", "device"])
@dtypes
@pytest.mark.parametrize("kind", [k for k in SHAPES if k not in ("many small", "many chunks")])
def test_stretches_give_what_whole_tensors_do(monkeypatch, kind, dtype, device):
    """Element by element the same bits (stochastic rounding too); sums in another order."""
    if device:
        monkeypatch.setattr(foreach_lists, "on_host", lambda t: False)
    elementwise = ("theta", "backup", "folded", "state1", "state2", "state3", "steps", "out")
    for kernel, run in KERNELS.items():
        whole = run(foreach, Problem(kind, dtype, dtype))
        with monkeypatch.context() as patch:
            patch.setattr(batches, "VECTORS" if device else "BATCH", 1000)
            cut = run(foreach, Problem(kind, dtype, dtype))
        assert_same_bits(*({n: v for n, v in r.items() if n in elementwise} for r in (cut, whole)))
        for name in {"partials", "realised", "direction"} & whole.keys():
            torch.testing.assert_close(cut[name], whole[name], rtol=1e-12, atol=1e-12, msg=f"{kernel}: {name}")


@dtypes
@pytest.mark.parametrize("missing", [(), (1, 4)], ids=["complete", "some missing"])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW], ids=lambda b: b.__name__)
@pytest.mark.parametrize("method", [m for m in METHODS if m != "exact"])
def test_whole_steps_as_on_a_device(monkeypatch, method, base, missing, dtype):
    """Groups whose tensors alternate, one of them not perturbed, gradients missing in some steps: as on the CPU."""
    ends = []
    for device in (False, True):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in [(4, 3), (4,), (), (2, 3, 2), (5,), (1,)]]
        params[3].data = params[3].data.permute(2, 0, 1)
        groups = [{"params": params[::2]}, {"params": params[1::2], "lr": 0.02, "perturb": method != "sam"}]
        optimizer = make(groups, base, method, backend="torch", lr=0.01, weight_decay=0.1)
        if device:
            monkeypatch.setattr(foreach_lists, "on_host", lambda t: False)
        for step in range(3):
            used = [p for i, p in enumerate(params) if not (i in missing and step == 1)]
            optimizer.step(lambda used=used: sum((p.float().square() * 0.5 + p.float().sin()).sum() for p in used))
        state = [v for p in params for v in optimizer.state[p].values() if isinstance(v, torch.Tensor)]
        ends.append([t.detach().double() for t in (*params, *state)])
    tolerance = 2 * torch.finfo(dtype).eps * 20
    for host, device in zip(*ends, strict=True):
        torch.testing.assert_close(device, host, rtol=tolerance, atol=tolerance)
