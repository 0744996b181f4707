"""Contract, point 3: buffers of `model` end as the first pass left them."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from gam_helpers import EVERY_PASS, METHODS, batch, closure_of, freeze, make, regression, same, trainer
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from gam_fused import FusedGAM
from gam_fused.transaction.model_state import ModelState
from gam_fused.transaction.snapshots import Snapshots


class Assigned(nn.Module):
    """Replaces its buffers by assignment, as observers and moving averages often do."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("hidden", torch.zeros(6), persistent=False)

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        self.calls = self.calls + 1
        self.hidden.add_(x.detach().sum(0))
        return x - self.mean


class Written(nn.Module):
    """Writes to a buffer in place, whatever its shape and dtype."""

    def __init__(self):
        super().__init__()
        self.register_buffer("total", torch.zeros(6))

    def forward(self, x):
        self.total.add_(x.detach().sum(0) / 3)
        return x


class Still(Written):
    """Only holds its buffer."""

    def forward(self, x):
        return x


class Repeated(nn.Module):
    """Its first forward puts memory of its own in place of the one element that the buffer repeats."""

    def __init__(self):
        super().__init__()
        self.register_buffer("total", torch.zeros(1).expand(6))

    def forward(self, x):
        self.total.data = self.total.data + 1
        return x


class Lists(nn.Module):
    """Keeps a module in a plain list, and names it."""

    def __init__(self):
        super().__init__()
        self.hidden = [nn.BatchNorm1d(6, affine=False)]

    def named_modules(self, *arguments, **keywords):
        yield from super().named_modules(*arguments, **keywords)
        yield "hidden", self.hidden[0]

    def named_buffers(self, *arguments, **keywords):
        yield from self.hidden[0].named_buffers()

    def forward(self, x):
        return self.hidden[0](x)


class Appears(nn.Module):
    """Has a buffer only from its first call on."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", None)

    def forward(self, x):
        self.scale = x.detach().abs().mean() if self.scale is None else 0.5 * self.scale
        return x / (1 + self.scale)


def flat_net(middle: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 6), middle, nn.Tanh(), nn.Linear(6, 2))


def image_net(middle: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Unflatten(1, (1, 1, 3)), nn.Conv2d(1, 4, 1), middle, nn.Tanh(), nn.Flatten(), nn.Linear(12, 2))


NETS = {
    "batch_norm": lambda: flat_net(nn.BatchNorm1d(6)),
    "batch_norm_cumulative": lambda: flat_net(nn.BatchNorm1d(6, momentum=None)),
    "batch_norm_2d": lambda: image_net(nn.BatchNorm2d(4, momentum=0.3)),
    "instance_norm": lambda: image_net(nn.InstanceNorm2d(4, track_running_stats=True)),
    "spectral_norm": lambda: nn.Sequential(spectral_norm(nn.Linear(3, 6)), nn.Tanh(), nn.Linear(6, 2)),
    "assigned": lambda: flat_net(Assigned()),
    "written": lambda: flat_net(Written()),
    "repeated": lambda: flat_net(Repeated()),
    "lists": lambda: flat_net(Lists()),
    "still": lambda: flat_net(Still()),
    "appears": lambda: flat_net(Appears()),
}


def net(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETS[name]()


def buffers(model: nn.Module) -> dict:
    return freeze({name: b if b.layout is torch.strided else b.to_dense() for name, b in model.named_buffers()})


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("method", METHODS)
def test_buffers_move_once_per_step(method, name):
    model = net(name)
    plain = copy.deepcopy(model)
    x, y = batch()
    optimizer, closure = trainer(method, model, regression(model, x, y), lr=0.0)
    for i in range(3):
        optimizer.step(closure)
        regression(plain, x, y)().backward()
        same(buffers(model), buffers(plain), f"after step {i}")


def test_num_batches_tracked_counts_steps():
    model = net("batch_norm_cumulative")
    optimizer, closure = trainer("finite_difference", model, regression(model, *batch()))
    for _ in range(5):
        optimizer.step(closure)
    assert int(model[1].num_batches_tracked) == 5
    assert model[1].momentum is None


@pytest.mark.parametrize("method", METHODS)
def test_buffers_stay_the_same_tensors(method):
    model = net("batch_norm")
    optimizer, closure = trainer(method, model, regression(model, *batch()))
    held = {name: (b, b.data_ptr()) for name, b in model.named_buffers()}
    for _ in range(2):
        optimizer.step(closure)
    assert all(b is held[name][0] and b.data_ptr() == held[name][1] for name, b in model.named_buffers())


@pytest.mark.parametrize("name", ["batch_norm", "assigned", "spectral_norm", "appears", "repeated", "lists"])
@pytest.mark.parametrize(("method", "bad"), EVERY_PASS)
def test_a_failure_restores_buffers(method, bad, name):
    model = net(name)
    loss_fn = regression(model, *batch())
    count = iter(range(100))

    def fails():
        loss = loss_fn()
        if next(count) == bad:
            raise RuntimeError("a bad batch")
        return loss

    optimizer, closure = trainer(method, model, fails)
    before = buffers(model)
    with pytest.raises(RuntimeError, match="a bad batch"):
        optimizer.step(closure)
    same(buffers(model), before)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.RMSprop], ids=lambda b: b.__name__)
@pytest.mark.parametrize("name", ["batch_norm", "assigned", "spectral_norm", "appears", "repeated", "lists"])
@pytest.mark.parametrize(("method", "bad"), EVERY_PASS)
def test_a_skipped_step_leaves_buffers_as_before(method, bad, name, base):
    model = net(name)
    loss_fn = regression(model, *batch())
    count = iter(range(100))

    def not_finite():
        loss = loss_fn()
        return loss * float("nan") if next(count) == bad else loss

    optimizer, closure = trainer(method, model, not_finite, base)
    before = buffers(model)
    optimizer.step(closure)
    assert int(optimizer.skipped_steps) == 1
    same(buffers(model), before)


def test_off_steps_move_buffers_once():
    model = net("batch_norm")
    optimizer, closure = trainer("finite_difference", model, regression(model, *batch()), interval=2)
    for _ in range(4):
        optimizer.step(closure)
    assert int(model[1].num_batches_tracked) == 4


def test_a_skipped_off_step_moves_no_buffer():
    model, factor = net("batch_norm"), 1.0
    loss_fn = regression(model, *batch())
    optimizer, closure = trainer("finite_difference", model, lambda: loss_fn() * factor, interval=2)
    optimizer.step(closure)
    before, factor = buffers(model), float("inf")
    optimizer.step(closure)
    assert optimizer.skipped_steps == 1
    same(buffers(model), before)


def test_several_models():
    first, second = net("batch_norm"), flat_net(nn.BatchNorm1d(6))
    x, y = batch()
    params = [*first.parameters(), *second.parameters()]
    optimizer = make(params, model=[first, second])
    closure = closure_of(optimizer, lambda: regression(first, x, y)() + regression(second, x, y)())
    optimizer.step(closure)
    assert int(first[1].num_batches_tracked) == int(second[1].num_batches_tracked) == 1


class OddBuffers(nn.Module):
    """Buffers without a plain layout: expanded, sparse (COO and CSR), quantized; each forward moves the ones it can."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("expanded", torch.zeros(1, 3).expand(4, 3))
        self.register_buffer("coo", torch.eye(3).to_sparse())
        self.register_buffer("csr", torch.eye(3).to_sparse_csr())
        self.register_buffer("quantized", torch.quantize_per_tensor(torch.ones(4), 0.5, 0, torch.quint8))

    def forward(self, x):
        self.expanded._base.add_(1)
        for buffer in (self.coo, self.csr):
            buffer.copy_(buffer * 2)
        return self.layer(torch.sparse.mm(self.coo.detach().clone(), x))

    def numbers(self):
        return [t.detach().to_dense().clone() for t in (self.expanded, self.coo, self.csr)]


@pytest.mark.filterwarnings("ignore:.*quantize.*", "ignore:Sparse CSR")
def test_buffers_that_are_expanded_sparse_or_quantized():
    model = OddBuffers()
    optimizer = make(model.parameters(), model=model)
    state = {"fails": False, "factor": 1.0}

    def closure():
        loss = model(torch.ones(3, 3)).square().sum() * state["factor"]
        if state["fails"]:
            raise RuntimeError("bad batch")
        return loss

    for k in range(2):
        optimizer.step(closure)
        same(model.numbers(), [torch.full((4, 3), k + 1.0), torch.eye(3) * 2 ** (k + 1), torch.eye(3) * 2 ** (k + 1)])
    before = model.numbers()
    state["factor"] = float("inf")
    optimizer.step(closure)
    assert optimizer.skipped_steps == 1
    same(model.numbers(), before)
    state["fails"] = True
    with pytest.raises(RuntimeError, match="bad batch"):
        optimizer.step(closure)
    same(model.numbers(), before)


def test_buffers_on_the_cpu_wait_for_the_flag():
    """A copy to the host that does not wait hands over memory that a GPU has yet to write."""

    class Flag:
        """Stands for a tensor on a GPU."""

        device = torch.device("cuda")

        def to(self, device, dtype=None, non_blocking=False):
            assert not non_blocking
            return torch.tensor(1.0)

    model = nn.BatchNorm1d(3)
    before = buffers(model)
    snapshots = ModelState([model]).begin()
    model(torch.randn(4, 3))
    snapshots.first_pass_done()
    snapshots.finish(Flag())
    same(buffers(model), before)


CHANGES = {
    "another tensor": ("batch_norm", lambda model: setattr(model[1], "running_mean", torch.ones(6))),
    "another dtype": ("batch_norm", lambda model: model.double()),
    "another dtype in place": ("written", lambda model: setattr(model[1].total, "data", torch.ones(6).double())),
    "another place": ("batch_norm", lambda model: setattr(model[1].running_mean, "data", torch.ones(6))),
    "another shape": ("written", lambda model: model[1].total.resize_(2, 6).zero_()),
    "other strides": ("batch_norm", lambda model: setattr(model[1].running_mean, "data", torch.ones(12)[::2])),
    "repeated": ("still", lambda model: setattr(model[1].total, "data", torch.ones(1).expand(6))),
    "sparse": ("still", lambda model: torch.utils.swap_tensors(model[1].total, torch.ones(6).to_sparse())),
    "another module": ("batch_norm", lambda model: model.__setitem__(2, nn.BatchNorm1d(6, affine=False))),
    "a buffer more": ("batch_norm", lambda model: model[1].register_buffer("more", torch.ones(3))),
    "no buffer": ("batch_norm", lambda model: model.__setitem__(1, nn.Tanh())),
    "another name": ("batch_norm", lambda model: model[1].register_buffer("old_mean", model[1].running_mean)),
}


@pytest.mark.parametrize(("name", "change"), CHANGES.values(), ids=CHANGES.keys())
def test_buffers_changed_between_steps(name, change):
    """The memory of snapshots is used again and again, but only while it is what the buffers need."""
    model = net(name)
    plain = copy.deepcopy(model)
    x, y = batch()
    optimizer, closure = trainer("finite_difference", model, lambda: regression(model, x, y)(), lr=0.0)
    for i in range(4):
        if i == 2:
            change(model)
            change(plain)
            dtype = model[0].weight.dtype
            x, y = x.to(dtype), y.to(dtype)
        optimizer.step(closure)
        regression(plain, x, y)().backward()
        same(buffers(model), buffers(plain), f"after step {i}")


def test_a_buffer_registered_between_steps_moves_once_per_step():
    class Net(nn.Linear):
        def forward(self, x):
            for buffer in self.buffers():
                buffer.add_(1)
            return super().forward(x)

    model = Net(3, 2)
    model.register_buffer("first", torch.zeros(3))
    optimizer = make(model.parameters(), model=model)
    for i in range(4):
        if i == 2:
            model.register_buffer("second", torch.zeros(3))
        optimizer.step(regression(model, *batch()))
    same([model.first, model.second], [torch.full((3,), 4.0), torch.full((3,), 2.0)])


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_buffers_of_a_lazy_module_move_once_per_step():
    """From the step on that follows the one that makes them, every pass starts from the same."""
    model, plain = (nn.Sequential(nn.LazyBatchNorm1d(affine=False), nn.Linear(3, 2)) for _ in range(2))
    optimizer, (x, y), seen = make(model[1].parameters(), model=model), batch(), []

    def closure():
        loss = (model(x) - y).square().mean()
        seen.append(model[0].running_mean.clone())
        return loss

    for i in range(3):
        seen.clear()
        optimizer.step(closure)
        plain(x)
        same(buffers(model), buffers(plain))
        assert all(torch.equal(mean, model[0].running_mean) for mean in seen) or i == 0


def test_modules_in_a_list_of_the_models_own_may_change():
    model = nn.Sequential(nn.Linear(3, 6), Lists())
    optimizer = make(model.parameters(), model=model, lr=0.0)
    for _ in range(2):
        model[1].hidden[0] = nn.BatchNorm1d(6, affine=False)
        optimizer.step(lambda: model(batch()[0]).square().sum() * 0.1)
        assert int(model[1].hidden[0].num_batches_tracked) == 1


def test_places_noted_anew_are_compared_anew():
    """Memory that is resized goes elsewhere, and its tensor then lies there as it lay before the step."""
    buffer = torch.zeros(2, 3)
    snapshots = Snapshots([buffer])
    assert snapshots.in_place()
    snapshots.take(0)
    buffer.untyped_storage().resize_(0)
    snapshots.bring_home()
    snapshots.put_back(0)
    same(buffer, torch.zeros(2, 3))
    assert snapshots.in_place()
    buffer.t_()
    assert not snapshots.in_place()
    snapshots.bring_home()
    assert snapshots.in_place()
    assert buffer.shape == (2, 3)


def test_snapshots_go_with_their_last_reference():
    """They hold as much memory as the buffers, twice."""
    snapshots = Snapshots([torch.zeros(3)])
    snapshots.take(0)
    snapshots.put_back(0)
    assert snapshots.in_place()
    gone = weakref.ref(snapshots)
    del snapshots
    assert gone() is None


def test_snapshots_of_two_users_are_apart():
    """Warming up for a graph keeps the buffers of before it while steps take snapshots of their own."""
    model = net("batch_norm")
    optimizer, closure = trainer("finite_difference", model, regression(model, *batch()))
    optimizer.step(closure)
    kept, before = ModelState([model]).begin(), buffers(model)
    for _ in range(2):
        optimizer.step(closure)
    kept.abort()
    same(buffers(model), before)


def test_the_docstring_says_that_buffers_need_the_model():
    text = " ".join(FusedGAM.__doc__.split())
    assert "buffers" in text
    assert "batch norm" in text
