"""One CUDA graph for a whole step: what it refuses, how warming up is undone (CPU), and that it equals eager steps (GPU)."""

from __future__ import annotations

import copy
from importlib.util import find_spec

import pytest
import torch
import torch.distributed as dist
from gam_helpers import METHODS, batch, close, closure_of, freeze, make, mixed_net, mlp, regression, same, snapshot
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import gam_fused
from gam_fused.graphs import capture_step
from gam_fused.graphs.capture import _check_same_kind
from gam_fused.graphs.preserve import Preserved

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
BASES = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
FIRST_ORDER = [m for m in METHODS if m != "exact"]
NO_TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
TRITON = pytest.param("triton", marks=NO_TRITON)


# What it refuses.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": torch.optim.NAdam}, "NAdam is not fused"),
        ({"method": "exact"}, "method='exact'"),
        ({"grad_scaler": torch.amp.GradScaler("cpu")}, "grad_scaler"),
        ({"backend": "reference"}, "reference"),
    ],
    ids=lambda o: str(o)[:30],
)
def test_what_cannot_be_in_a_graph_is_named(options, message):
    model = mlp()
    optimizer = make(model.parameters(), **options)
    before = snapshot(optimizer, model)
    with pytest.raises(ValueError, match=message):
        capture_step(optimizer, lambda x: model(x).sum(), batch()[:1])
    same(snapshot(optimizer, model), before)


def test_distributed_steps_are_refused(tmp_path):
    """Graphs know nothing of `no_sync` and of the all-reduces between passes."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        model = DistributedDataParallel(mlp())
        local = make(model.parameters(), model=model, perturb_sync="local")
        mesh = init_device_mesh("cpu", (1,))
        sharded = make([nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))])
        for optimizer, message in ((local, "perturb_sync='local'"), (sharded, "sharded parameters")):
            with pytest.raises(ValueError, match=message):
                capture_step(optimizer, lambda x: x.sum(), batch()[:1])
    finally:
        dist.destroy_process_group()


def test_other_optimizers_and_inputs_are_refused():
    model = mlp()
    with pytest.raises(TypeError, match="not of a SGD"):
        capture_step(torch.optim.SGD(model.parameters(), lr=0.1), lambda x: model(x).sum(), batch()[:1])
    optimizer = make(model.parameters())
    with pytest.raises(TypeError, match="Tensor"):
        capture_step(optimizer, lambda x: model(x).sum(), batch()[0])
    with pytest.raises(TypeError, match="'int'"):
        capture_step(optimizer, lambda x, n: model(x).sum(), [batch()[0], 3])
    with pytest.raises(ValueError, match="warmup"):
        capture_step(optimizer, lambda x: model(x).sum(), batch()[:1], warmup=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_cuda_device_the_error_says_so():
    model = mlp()
    optimizer = make(model.parameters())
    before = snapshot(optimizer, model)
    with pytest.raises(RuntimeError, match=r"CUDA device.*optimizer\.step\(closure\)"):
        gam_fused.graphs.capture_step(optimizer, lambda x: model(x).sum(), batch()[:1])
    same(snapshot(optimizer, model), before)


@pytest.mark.parametrize(
    "inputs", [(torch.ones(3),), (torch.ones(3), torch.ones(2)), (torch.ones(3), torch.ones(4).double())]
)
def test_inputs_that_differ_from_the_examples_are_named(inputs):
    with pytest.raises((TypeError, ValueError), match=r"captured with"):
        _check_same_kind(inputs, (torch.ones(3), torch.ones(4)))


# Warming up is undone.


def with_state(kind, base, method):
    """A model and its optimizer: new, in the middle of training, or with a checkpoint of the base optimizer loaded."""
    model = mixed_net()
    optimizer = make(model.parameters(), BASES[base], method, model=model)
    closure = closure_of(optimizer, regression(model, *batch()))
    if kind == "trained":
        optimizer.step(closure)
    if kind == "loaded":
        plain = BASES[base](model.parameters(), **({"lr": 0.1, "momentum": 0.9} if base == "sgd" else {"lr": 0.1}))
        for _ in range(2):
            plain.zero_grad()
            regression(model, *batch())().backward()
            plain.step()
        optimizer.load_state_dict(plain.state_dict())
    return model, optimizer, closure


@pytest.mark.parametrize("kind", ["new", "trained", "loaded"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", FIRST_ORDER)
def test_warming_up_leaves_no_trace(method, base, kind):
    model, optimizer, closure = with_state(kind, base, method)
    _, twin, twin_closure = with_state(kind, base, method)
    preserved = Preserved(optimizer.session, optimizer.prepare())
    before, steps = snapshot(optimizer, model), optimizer.session.steps_taken
    addresses = [p.data_ptr() for p in model.parameters()]
    for i in range(3):
        optimizer.step(lambda i=i: closure() * (float("nan") if i == 1 else 1.0) if i else closure())
    states = [t for entry in optimizer.state.values() for t in entry.values()]
    preserved.put_back()
    optimizer.session.steps_taken = steps  # a captured step's warm-up does not count them
    assert [p.data_ptr() for p in model.parameters()] == addresses
    assert all(a is b for a, b in zip(states, (t for e in optimizer.state.values() for t in e.values()), strict=True))
    if kind == "new":  # a graph goes on with these very tensors, as if they had just been made
        assert states
        assert not any(bool(t.any()) for t in states)
    random = torch.get_rng_state()
    for _ in range(2):  # the tensors that warming up has made are the ones in use
        optimizer.step(closure)
    assert all(a is b for a, b in zip(states, (t for e in optimizer.state.values() for t in e.values()), strict=True))
    preserved.put_back()
    optimizer.session.steps_taken = steps
    same(snapshot(optimizer, model), before)
    torch.set_rng_state(random)
    for _ in range(3):
        optimizer.step(closure)
    torch.set_rng_state(random)
    for _ in range(3):
        twin.step(twin_closure)
    same(freeze(optimizer.state_dict()), freeze(twin.state_dict()))
    same(snapshot(optimizer)["weights"], snapshot(twin)["weights"])


# On a GPU.


def conv_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(3, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 16), nn.ReLU(), nn.Dropout(0.3),
        nn.Linear(16, 2),
    ).cuda()  # fmt: skip


class Task:
    """The same training, captured or eager; inputs, learning rate, rho and rho_prime change from step to step."""

    def __init__(self, captured, method="finite_difference", base="sgd", loss=None, **options):
        self.model = conv_net()
        self.optimizer = make(self.model.parameters(), BASES[base], method, lr=0.05, model=self.model, **options)
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.8)
        self.loss = loss or (lambda x, y: (self.model(x) - y).square().mean())
        self.captured = captured
        self.capture()

    def capture(self):
        x, y = batch(16)
        self.replay = capture_step(self.optimizer, self.loss, (x.cuda(), y.cuda())) if self.captured else None

    def train(self, steps, start=0, spoil=None):
        losses = []
        for i in range(start, start + steps):
            x, y = (t.cuda() for t in batch(16, seed=i))
            x = x * float("inf") if i == spoil else x
            self.optimizer.param_groups[0]["rho"] = 0.1 + 0.01 * i
            if self.optimizer.method != "sam":
                self.optimizer.rho_prime = 0.05 + 0.01 * i
            losses.append(self.replay(x, y) if self.captured else self.optimizer.step(lambda x=x, y=y: self.loss(x, y)))
            self.schedule.step()
        return losses

    def contents(self):
        return [t for t in self.model.state_dict().values() if t.is_floating_point()]


def assert_equal(captured: Task, eager: Task):
    close(captured.contents(), [t.double() for t in eager.contents()], 1e-5)
    assert torch.equal(captured.random, eager.random)


def pair(steps=4, spoil=None, **options):
    """Both ways from the same seeds; each task remembers where the generator ended."""
    tasks, losses = [], []
    for captured in (False, True):
        torch.manual_seed(11)
        task = Task(captured, **options)
        torch.manual_seed(11)
        losses.append(torch.stack(task.train(steps, spoil=spoil)))
        task.random = torch.cuda.get_rng_state()
        tasks.append(task)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6, equal_nan=True)
    return tasks[1], tasks[0]


class TestOnGPU:
    pytestmark = gpu

    @pytest.mark.parametrize("backend", ["auto", "torch", TRITON])
    @pytest.mark.parametrize("base", BASES)
    @pytest.mark.parametrize("method", FIRST_ORDER)
    def test_equals_the_eager_step(self, method, base, backend):
        """Dropout, batch norm, schedules of lr, rho and rho_prime."""
        captured, eager = pair(method=method, base=base, backend=backend)
        assert_equal(captured, eager)
        assert captured.optimizer.session.steps_taken == 4

    @pytest.mark.parametrize(
        "options",
        [
            {"max_grad_norm": 0.05},
            {"adaptive": True},
            {"oracle": "sam", "sam_rho": 0.3},
            {"flatten": True},
            {"interval": 2},
            {"interval": 3, "oracle": "sam"},
        ],
        ids=str,
    )
    def test_with_options(self, options):
        assert_equal(*pair(**options))

    def test_capturing_leaves_no_trace(self):
        torch.manual_seed(5)
        task = Task(False)
        task.train(2)
        before, random = snapshot(task.optimizer, task.model), torch.cuda.get_rng_state()
        task.captured = True
        task.capture()
        same(snapshot(task.optimizer, task.model), before)
        assert torch.equal(torch.cuda.get_rng_state(), random)

    def test_all_passes_see_the_same_masks_and_steps_see_others(self):
        masks = []

        class Watched(nn.Dropout):
            def forward(self, x):
                masks.append(super().forward(torch.ones_like(x)))
                return x * masks[-1]

        model = nn.Sequential(nn.Linear(3, 64), Watched(0.5), nn.Linear(64, 2)).cuda()
        optimizer = make(model.parameters(), model=model)
        x, y = (t.cuda() for t in batch())
        step = capture_step(optimizer, lambda x, y: (model(x) - y).square().mean(), (x, y))
        inside, seen = masks[-4:], []
        for _ in range(3):
            step(x, y)
            assert all(torch.equal(m, inside[0]) for m in inside)
            seen.append(inside[0].clone())
        assert not torch.equal(seen[0], seen[1])
        assert not torch.equal(seen[1], seen[2])

    def test_a_gradient_that_is_not_finite_skips_the_replay(self):
        captured, eager = pair(spoil=1)
        assert captured.optimizer.skipped_steps == eager.optimizer.skipped_steps == 1
        assert_equal(captured, eager)

    def test_replaced_state_and_settings_are_captured_anew(self):
        captured, eager = pair()
        for task in (captured, eager):
            task.optimizer.load_state_dict(copy.deepcopy(task.optimizer.state_dict()))
            torch.manual_seed(1)
            task.train(2, start=4)
            task.optimizer.max_grad_norm = 0.01
            task.train(2, start=6)
            task.random = torch.cuda.get_rng_state()
        assert_equal(captured, eager)

    def test_hooks_diagnostics_and_schedulers(self):
        captured, eager = pair()
        calls = []
        captured.optimizer.register_step_post_hook(lambda *_: calls.append(1))
        for task in (captured, eager):
            torch.manual_seed(1)
            task.train(2, start=4)
        assert len(calls) == 2
        for name, value in eager.optimizer.diagnostics().items():
            torch.testing.assert_close(captured.optimizer.diagnostics()[name], value, rtol=1e-3, atol=1e-5)

    def test_a_replay_does_not_wait_for_the_device(self):
        captured, _ = pair()
        x, y = (t.cuda() for t in batch(16))
        torch.cuda.set_sync_debug_mode("error")
        try:
            captured.replay(x, y)
        finally:
            torch.cuda.set_sync_debug_mode("default")
