"""No step makes the host wait for the device: every method and option on fake CUDA tensors, every copy and read watched."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
import torch.distributed as dist
from fake_cuda import Device, Event, fake_cuda
from gam_helpers import METHODS, make
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW

from gam_fused import backends, graphs
from gam_fused.backends import triton
from gam_fused.backends.compiled import CompiledBackend
from gam_fused.backends.operands import KERNELS
from gam_fused.graphs import capture, recording
from gam_fused.integrations import BatchClosure
from gam_fused.methods import TAKES

BACKENDS = ["torch", "cuda", "triton"]
SHAPES = [(4, 3), (4,), ()]
FIRST_ORDER = [m for m in METHODS if m != "exact"]


class Operators:
    """In place of the CUDA backend's operators: they look at where their operands are."""

    def __getattr__(self, kernel):
        return SimpleNamespace(default=check_operands)


def check_operands(table, map_, workspace, chunk, dtype, *rest):
    assert table.device.type == "cpu"
    assert map_.device.type == "cuda" or not map_.numel()  # it then goes along with the launch
    tables = [t for t in rest if isinstance(t, torch.Tensor) and t.dtype is not torch.int64]
    assert all(t.device.type == "cuda" for t in tables), "tables and sums are on the device"
    assert len({t.device for t in (map_, workspace, *tables) if t.device.type == "cuda"}) <= 1


class Kernel:
    """In place of a Triton kernel, and of what it is compiled to."""

    arg_names = ()

    def __getitem__(self, grid):
        return self

    def __call__(self, *arguments, **constants):
        devices = {t.device for t in arguments if isinstance(t, torch.Tensor)}
        assert devices == {torch.device("cuda", Device.current)}, "Triton launches on the current device"
        return self


@pytest.fixture
def watched(monkeypatch):
    """The `Watch`. Launches of `cuda` and `triton` go to stubs; all that surrounds them is what runs on a GPU."""
    compiled = CompiledBackend("CUDA", "_cuda", lambda: "", Operators())
    compiled._reason = ""
    monkeypatch.setitem(backends._BACKENDS, "cuda", (compiled, ("cuda",)))
    monkeypatch.setitem(backends._BACKENDS, "triton", (triton.backend, ("cuda",)))
    monkeypatch.setattr(triton, "reason", lambda: "")
    monkeypatch.setattr(triton, "kernels", lambda: dict.fromkeys(KERNELS, Kernel()))
    monkeypatch.setattr(triton, "constants", lambda kernel, dtype: {})
    monkeypatch.setattr(triton, "options", lambda kernel, dtype, device_type, algorithm: {})
    monkeypatch.setattr(triton.backend, "prepared", {})
    monkeypatch.setattr(triton, "_TABLES", triton._Tables(8))
    monkeypatch.setattr(torch.autograd, "grad", lambda outputs, inputs, **_: gradients_of(inputs))
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: put_gradients(PARAMS))
    with fake_cuda(monkeypatch) as watch:
        yield watch


def gradients_of(params):
    """Gradients without a forward: what autograd waits for is not ours."""
    with torch.enable_grad():
        return [torch.empty_like(p).requires_grad_() for p in params]


PARAMS: list[torch.Tensor] = []  # of the closure that ran last


def put_gradients(params, missing=()):
    for i, p in enumerate(params):
        if i not in missing:
            p.grad = torch.empty_like(p)


def parameters(shapes=SHAPES, dtype=torch.float32, device="cuda:0"):
    return [nn.Parameter(torch.empty(shape, dtype=dtype, device=device)) for shape in shapes]


def closure_for(optimizer, *, model=None, missing=(), others=()):
    """Gradients without a forward: what autograd waits for is not ours."""

    def closure():
        params = [p for group in optimizer.param_groups for p in group["params"]]
        loss = torch.zeros((), device=params[0].device, requires_grad=True)
        PARAMS[:] = params
        if optimizer.method == "exact":
            return loss
        if optimizer.grad_scaler:
            optimizer.grad_scaler.scale(loss.detach())
        put_gradients(params, missing)
        for buffer in model.buffers() if model is not None else ():
            buffer.add_(1)
        return loss.detach()

    return closure


def steps(optimizer, closure, watch, count=3, between=lambda i: None):
    """Steps and what is asked after each; the first one makes tables and state."""
    for i in range(count):
        between(i)
        optimizer.step(BatchClosure(lambda _: closure(), torch.zeros(8)))
        optimizer.diagnostics()
    assert not watch.waits, "\n".join(sorted(set(watch.waits)))


OPTIONS = {
    "plain": {},
    "momentum": {"momentum": 0.9, "nesterov": True},
    "weight decay": {"weight_decay": 0.1},
    "adamw": {"base": AdamW, "weight_decay": 0.1},
    "amsgrad": {"base": AdamW, "amsgrad": True, "maximize": True},
    "interval": {"interval": 2},
    "adaptive": {"adaptive": True},
    "clipped": {"max_grad_norm": 1.0},
    "no replay": {"preserve_rng_state": False},
    "oracle": {"oracle": "sam"},
    "bound": {"max_ratio": 0.5, "momentum": 0.9},
    "bound, oracle": {"max_ratio": 0.5, "alpha": float("inf"), "oracle": "sam"},
    "part": {"flatness_fraction": 0.25, "momentum": 0.9},
    "oracle, extra pass": {"oracle": "sam", "sam_rho": 0.2, "interval": 2},
    "part, adaptive, clipped": {"flatness_fraction": 0.25, "adaptive": True, "max_grad_norm": 1.0, "interval": 2},
    "part, bound, oracle": {"flatness_fraction": 0.25, "max_ratio": 0.5, "oracle": "sam", "base": AdamW, "adaptive": True},
}


WITH_ORACLE = ("finite_difference", "exact", "gradient_penalty")


@pytest.mark.parametrize(
    ("method", "option"),
    [(m, o) for m in METHODS for o in OPTIONS if m in WITH_ORACLE or not ("oracle" in o or "bound" in o)],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_options(watched, backend, method, option):
    options = {"momentum": 0.0, **OPTIONS[option]} if "base" not in OPTIONS[option] else OPTIONS[option]
    optimizer = make(parameters(), method=method, backend=backend, **options)
    steps(optimizer, closure_for(optimizer), watched)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("base", [SGD, AdamW], ids=lambda b: b.__name__)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes(watched, backend, base, dtype):
    for method in FIRST_ORDER:
        optimizer = make([*parameters(dtype=dtype), *parameters()], base, method, backend=backend)
        steps(optimizer, closure_for(optimizer), watched)


@pytest.mark.parametrize("base", [SGD, AdamW], ids=lambda b: b.__name__)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_schedule_that_changes_everything_in_every_step(watched, backend, method, base):
    optimizer = make(parameters(), base, method, backend=backend)

    def schedule(i):
        for group in optimizer.param_groups:
            group["lr"], group["rho"] = 0.1 / (1 + i), 0.1 + i
        optimizer.xi, optimizer.max_grad_norm = 1e-12 * (1 + i), 1.0 + i
        for name in {"alpha", "max_ratio", "rho_prime"} & TAKES[method].names:
            setattr(optimizer, name, 0.1 * (1 + i))
        optimizer.flatness_fraction = 1 / (1 + i)

    steps(optimizer, closure_for(optimizer), watched, between=schedule)


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
@pytest.mark.parametrize("base", [SGD, AdamW], ids=lambda b: b.__name__)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_learning_rate_that_is_a_tensor(watched, backend, base, device):
    lr = torch.full((), 0.1, device=device)
    extra = {"capturable": True, "foreach": True} if base is AdamW else {}
    optimizer = make(parameters(), base, backend=backend, **extra)
    optimizer.param_groups[0]["lr"] = lr  # torch's constructors read it
    steps(optimizer, closure_for(optimizer), watched, between=lambda i: lr.mul_(0.5))


@pytest.mark.parametrize("stepped_by", ["optimizer", "scaler"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_scaling(watched, backend, method, stepped_by):
    scaler = torch.amp.GradScaler("cpu")
    optimizer = make(parameters(), method=method, backend=backend, grad_scaler=scaler)
    closure = closure_for(optimizer)
    for _ in range(3):
        optimizer.step(closure) if stepped_by == "optimizer" else scaler.step(optimizer, closure)
        optimizer.interval = 2
        optimizer.diagnostics()
        scaler.update()
    optimizer.grad_scaler = None
    steps(optimizer, closure, watched, 1)


@pytest.mark.parametrize("base", [SGD, AdamW], ids=lambda b: b.__name__)
@pytest.mark.parametrize("method", FIRST_ORDER)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_that_are_missing(watched, backend, method, base):
    optimizer = make(parameters(), base, method, backend=backend)
    missing: set[int] = {1}
    passes: Counter[str] = Counter()
    inner = closure_for(optimizer, missing=missing)

    def closure():  # another one in every pass
        missing.clear()
        missing.add(passes["made"] % 2)
        passes["made"] += 1
        return inner()

    steps(optimizer, closure, watched, 4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_of_all_kinds(watched, backend, method):
    first, second, third, fourth = (parameters() for _ in range(4))
    groups = [
        {"params": first},
        {"params": second, "rho": 0.3, "lr": 0.01, "weight_decay": 0.1},
        {"params": third, "perturb": False},
        {"params": fourth, "maximize": True},
    ]
    optimizer = make(groups, method=method, backend=backend)
    steps(optimizer, closure_for(optimizer), watched)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_buffers_of_a_model(watched, backend, method):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)).to("cuda:0")
    watched.waits.clear()  # of the line above
    optimizer = make(model.parameters(), method=method, backend=backend, model=model)
    steps(optimizer, closure_for(optimizer, model=model), watched)


@pytest.mark.parametrize("method", FIRST_ORDER)
@pytest.mark.parametrize("backend", BACKENDS)
def test_losses_of_all_kinds(watched, backend, method):
    for loss in (0.5, torch.tensor(0.5), torch.zeros((), device="cuda:0", dtype=torch.bfloat16), None):
        optimizer = make(parameters(), method=method, backend=backend)
        closure = closure_for(optimizer)
        steps(optimizer, lambda c=closure, value=loss: (c(), value)[1], watched, 2)


class Replicated(DistributedDataParallel):
    """A DDP wrapper without its reducer, which wants a real device."""

    def __init__(self, module):
        nn.Module.__init__(self)
        self.module, self.process_group, self.parameters_to_ignore = module, "group", set()
        self.require_backward_grad_sync = self.require_forward_param_sync = True
        self.forward_sync_buffers = self.broadcast_buffers = True  # by version of torch
        self.modules_buffers = list(module.buffers())

    @contextmanager
    def no_sync(self):
        yield


@pytest.mark.parametrize("fraction", [1.0, 0.25])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_local_perturbations(watched, monkeypatch, backend, method, fraction):
    options = {} if method == "exact" else {"perturb_sync": "local", "max_grad_norm": 1.0}
    options["flatness_fraction"] = fraction
    monkeypatch.setattr(dist, "all_reduce", lambda t, group: None)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(dist, "get_rank", lambda group: 1)
    module = nn.Module()
    for i, p in enumerate(parameters()):
        module.register_parameter(str(i), p)
    model = Replicated(module)
    optimizer = make(model.parameters(), method=method, backend=backend, model=model, **options)
    steps(optimizer, closure_for(optimizer), watched)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_devices(watched, backend):
    for method in FIRST_ORDER:
        optimizer = make([*parameters(), *parameters(device="cuda:1")], method=method, backend=backend)
        steps(optimizer, closure_for(optimizer), watched)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_made_on_the_current_device_where_that_is_another(watched, backend, method):
    assert Device.current == 0
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).to("cuda:1")
    options = {"max_grad_norm": 1.0, "interval": 2, "oracle": "sam" if method in WITH_ORACLE else "loss"}
    optimizer = make(model.parameters(), AdamW, method, backend=backend, model=model, **options)
    watched.devices.clear(), watched.waits.clear()
    steps(optimizer, closure_for(optimizer, model=model), watched)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step(closure_for(optimizer, model=model))
    assert {d for d in watched.devices if d.type == "cuda"} == {torch.device("cuda:1")}, watched.devices


def test_the_estimate_of_noise_is_awaited_where_it_is_computed(watched):
    """The current device is another than the parameters'."""
    optimizer = make(parameters(device="cuda:1"), backend="cuda")
    steps(optimizer, closure_for(optimizer), watched)
    assert Event.recorded_on == [1]


class Capture:
    """`torch.cuda.graph`."""

    modes: list[str] = []  # noqa: RUF012
    running = False

    def __init__(self, graph, pool=None, stream=None, capture_error_mode="global"):
        self.modes.append(capture_error_mode)

    def __enter__(self):
        Capture.running = True

    def __exit__(self, *_):
        Capture.running = False


@pytest.mark.parametrize("base", [SGD, AdamW], ids=lambda b: b.__name__)
@pytest.mark.parametrize("backend", BACKENDS)
def test_captured_steps(watched, monkeypatch, backend, base):
    """Other threads, such as one that pins batches, may use the device while a step is captured."""
    Capture.modes = []
    monkeypatch.setattr(recording, "WORDS", 2)  # not enough for the tables of `triton`: they are captured again
    for name in ("CUDAGraph", "Stream", "stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(capture, "_check_optimizer", lambda optimizer: torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: Capture.running)
    for method in FIRST_ORDER:
        optimizer = make(parameters(), base, method, backend=backend, preserve_rng_state=False, interval=2)
        closure = closure_for(optimizer)
        step = graphs.capture_step(optimizer, lambda x, c=closure: c(), [torch.zeros(2, device="cuda:0")])
        for i in range(3):
            optimizer.param_groups[0]["lr"] = 0.1 / (1 + i)
            step(torch.zeros(2).pin_memory())
            optimizer.diagnostics()
    assert not watched.waits, "\n".join(sorted(set(watched.waits)))
    captures = 2 * len(FIRST_ORDER) * (2 if backend == "triton" else 1)
    assert Capture.modes == ["thread_local"] * captures


def test_a_foreign_base_asks_once_a_step_whether_to_skip(watched, monkeypatch):
    optimizer = make(parameters(), torch.optim.RMSprop, "sam", backend="cuda", capturable=True)
    monkeypatch.setattr(optimizer.base_optimizer, "step", lambda: None)
    for _ in range(3):
        optimizer.step(closure_for(optimizer))
        optimizer.diagnostics()
    assert len(watched.waits) == 3, watched.waits
    assert all("_local_scalar_dense" in line for line in watched.waits)


def test_skipped_steps_asks(watched):
    """The watch sees what waits: this does, as its docstring says."""
    optimizer = make(parameters(), backend="cuda")
    steps(optimizer, closure_for(optimizer), watched, 1)
    assert optimizer.skipped_steps == 1
    assert len(watched.waits) == 1
    assert watched.waits[0].startswith("step/session.py:")


def test_waits_are_seen(watched):
    t, mask = torch.zeros(4, device="cuda:0"), torch.ones(4, device="cuda:0") > 0
    for wait in (
        lambda: t[0].item(),
        lambda: t.tolist(),
        lambda: bool(t[0]),
        lambda: t.cpu(),
        lambda: torch.zeros(4).to("cuda:0"),
        lambda: torch.zeros(4).to("cuda:0", non_blocking=True),  # not pinned
        lambda: torch.zeros(4).pin_memory().to("cuda:0", torch.float64, non_blocking=True),  # through another type
        lambda: t[[0, 1]],
        lambda: t.index_put_((mask,), t[0]),
        lambda: t.__setitem__(0, 1.0),
        lambda: t.__setitem__(slice(1, 3), torch.ones(2)),
        lambda: torch._foreach_add_([t, t], t[0]),
        lambda: torch.tensor([1.0], device="cuda:0"),
    ):
        watched.waits.clear()
        wait()
        assert watched.waits
    watched.waits.clear()
    t[0].fill_(1.0)
    torch.zeros(4).pin_memory().to("cuda:0", non_blocking=True)
    torch.where(mask, t, 0.0)
    assert not watched.waits
    assert Event.recorded_on == []
