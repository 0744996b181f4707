"""The mini-batch in `step(closure, batch)`: the same in every pass, whatever a closure takes out of it or puts in."""

from __future__ import annotations

import copy
import dataclasses
import gc
import weakref
from collections import OrderedDict, UserDict, UserList, deque
from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest
import torch
from gam_helpers import METHODS, batch, make, mlp, same, snapshot
from torch import Tensor, nn

from gam_fused import flatness
from gam_fused.integrations import BatchClosure


@dataclasses.dataclass
class Sample:
    x: Tensor
    y: Tensor


@dataclasses.dataclass(slots=True)
class Noted:
    x: Tensor
    y: Tensor
    seen: bool = dataclasses.field(init=False)


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: Tensor
    y: Tensor


class Inside(NamedTuple):
    inner: dict[str, Tensor]


def data():
    return batch(n=8, dtype=torch.float64)


def take_entries(b):
    x, y = b["x"], b.pop("y")
    b["x"], b["seen"] = 2 * x, True
    return 2 * x, y


def take_items(b):
    y, x = b.pop(), b.pop()
    b.append(0)
    return 2 * x, y


def set_fields(b):
    b.x = 2 * b.x
    return b.x, b.y


def take_fields(b):
    assert not hasattr(b, "seen")
    x, y, b.seen = b.x, b.y, True
    del b.x
    return 2 * x, y


def keep_more(b):
    if not hasattr(b, "more"):
        b.more = 2 * b.x
    else:
        b.more = b.more + 1  # of another pass
    return b.more, b.y


def set_frozen(b):
    object.__setattr__(b, "x", 2 * b.x)
    object.__setattr__(b, "more", True)
    return b.x, b.y


def take_inside(b):
    inner = b["inner"]
    return take_entries(inner[0])


KINDS: dict[str, tuple[Any, Any]] = {
    "dict": (lambda x, y: {"x": x, "y": y}, take_entries),
    "OrderedDict": (lambda x, y: OrderedDict(x=x, y=y), take_entries),
    "UserDict": (lambda x, y: UserDict(x=x, y=y), take_entries),
    "list": (lambda x, y: [x, y], take_items),
    "UserList": (lambda x, y: UserList([x, y]), take_items),
    "deque": (lambda x, y: deque([x, y]), take_items),
    "dataclass": (Sample, set_fields),
    "dataclass, fields that come and go": (Noted, take_fields),
    "dataclass, more attributes": (Sample, keep_more),
    "frozen dataclass": (Frozen, set_frozen),
    "in a namedtuple": (lambda x, y: Inside({"x": x, "y": y}), lambda b: take_entries(b.inner)),
    "nested": (lambda x, y: {"inner": ({"x": x, "y": y},), "names": ["a"] * 8}, take_inside),
}


def trained(method, fraction, closure, new):
    """A model after two steps, each on a new batch."""
    model = mlp(torch.float64)
    optimizer = make(model, method=method, flatness_fraction=fraction)
    for _ in range(2):
        optimizer.step(lambda b: closure(model, b), new())
    return snapshot(optimizer)


@pytest.mark.parametrize("fraction", [1, 0.5])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_closure_may_take_things_out_of_its_batch(kind, method, fraction):
    made, take = KINDS[kind]

    def taking(model, b):
        x, y = take(b)
        return (model(x) - y).square().mean()

    def reading(model, b):
        return (model(2 * b[0]) - b[1]).square().mean()

    same(trained(method, fraction, taking, lambda: made(*data())), trained(method, fraction, reading, data))


def contents(b):
    if dataclasses.is_dataclass(b):
        return {name: getattr(b, name) for name in ("x", "y", "seen", "more") if hasattr(b, name)}
    return copy.copy(b)


@pytest.mark.parametrize("fraction", [1, 0.5])
@pytest.mark.parametrize("bad", [None, 0, 2])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "nested"])
def test_afterwards_it_is_as_after_one_pass_or_as_before_a_step_that_failed(kind, bad, fraction):
    made, take = KINDS[kind]
    b, twin, passes = made(*data()), made(*data()), []
    if bad is None:
        take(twin)
    optimizer = make(model := mlp(torch.float64), flatness_fraction=fraction)

    def closure(b):
        x, y = take(b)
        passes.append(x)
        if len(passes) - 1 == bad:
            raise RuntimeError("bad batch")
        return (model(x) - y).square().mean()

    if bad is None:
        optimizer.step(closure, b)
    else:
        with pytest.raises(RuntimeError, match="bad batch"):
            optimizer.step(closure, b)
    torch.testing.assert_close(contents(b), contents(twin), rtol=0, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_that_is_written_to_in_place_is_named(method):
    """Augmentation or normalisation in place: the next pass would see it done twice."""
    optimizer = make(model := mlp(torch.float64), method=method)
    before = snapshot(optimizer)

    def closure(b):
        b["images"][0].mul_(0.5)
        return (model(b["images"][0]) - b["y"]).square().mean()

    x, y = data()
    told = r"batch\['images'\]\[0\] \(shape \(8, 3\), torch.float64\) or .* was written to in place.*clone"
    with pytest.raises(RuntimeError, match=told):
        optimizer.step(closure, {"images": (x,), "y": y})
    same(snapshot(optimizer), before)


def test_a_part_that_is_written_to_is_named():
    """A part is views of the batch."""
    optimizer = make(model := mlp(torch.float64), flatness_fraction=0.5)

    def closure(b):
        x, y = b
        if len(x) < 8:
            x.mul_(0.5)
        return (model(x) - y).square().mean()

    with pytest.raises(RuntimeError, match=r"batch\[0\] .* was written to in place"):
        optimizer.step(closure, data())


WRITES = {
    "a mask of labels": lambda x, y: y.masked_fill_(y < 0, -1.0),
    "random places": lambda x, y: x.index_fill_(1, torch.randperm(3)[:2], 0.0),
    "bounds": lambda x, y: x.clamp_(-0.5, 0.5),
}


@pytest.mark.parametrize("fraction", [1, 0.5])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", WRITES)
def test_a_closure_may_write_what_it_writes_again(kind, method, fraction):
    """Every pass computes the loss of the same batch."""

    def in_place(model, b):
        WRITES[kind](*b)
        return (model(b[0]) - b[1]).square().mean()

    def on_copies(model, b):
        return in_place(model, [t.clone() for t in b])

    same(trained(method, fraction, in_place, data), trained(method, fraction, on_copies, data))


def test_a_plain_step_may_write_to_its_batch():
    """One pass, as under torch."""
    optimizer = make(model := mlp(torch.float64), interval=2)
    x, y = data()
    optimizer.step(lambda b: (model(b[0]) - b[1]).square().mean(), (x, y))
    optimizer.step(lambda b: (model(b[0].mul_(0.5)) - b[1]).square().mean(), (x, y))


def test_memory_that_batches_take_turns_in():
    """What is written between steps is another batch, and one made in inference mode counts no writes."""
    optimizer = make(model := mlp(torch.float64), flatness_fraction=0.5)
    x, y = data()
    closure = BatchClosure(lambda b: (model(b[0]) - b[1]).square().mean(), [x, y])
    for _ in range(3):
        x.mul_(1.1)
        optimizer.step(closure)
    with torch.inference_mode():
        x, y = data()
    optimizer.step(lambda b: (model(b[0].clone()) - b[1].clone()).square().mean(), (x, y))


def test_a_batch_that_nobody_wrote_to_is_not_written_to():
    class Sealed(dict):
        def __setitem__(self, key, value):
            raise AssertionError("written to")

        def clear(self):
            raise AssertionError("cleared")

    x, y = data()
    optimizer = make(model := mlp(torch.float64))
    optimizer.step(lambda b: (model(b["x"]) - b["y"]).square().mean(), Sealed(x=x, y=y))


def test_a_batch_that_holds_itself():
    b: dict[str, Any] = dict(zip("xy", data(), strict=True))
    b["self"] = b
    optimizer = make(model := mlp(torch.float64))
    optimizer.step(lambda b: (model(b["self"]["x"]) - b.pop("y")).square().mean(), b)
    assert list(b) == ["x", "self"]


def test_the_order_of_a_dict_is_that_of_one_pass():
    b = OrderedDict(zip("yxab", (*reversed(data()), 1, 2), strict=True))
    b.move_to_end("y")
    optimizer, orders = make(model := mlp(torch.float64)), []

    def closure(b):
        orders.append("".join(b))
        b.move_to_end("a")
        b.pop("b")
        return (model(b["x"]) - b["y"]).square().mean()

    optimizer.step(closure, b)
    assert orders == ["xaby"] * 4
    assert "".join(b) == "xya"


class Doubling(UserDict):
    """Makes what it is asked for."""

    def __getitem__(self, key):
        return 2 * self.data[key]


def test_a_dict_that_makes_its_items_is_not_filled_with_them():
    seen = []

    def closure(model, b):
        seen.append(b["x"])
        return (model(b["x"]) - b["y"]).square().mean()

    x, y = data()
    trained("finite_difference", 1, closure, lambda: Doubling(x=x, y=y))
    assert all(torch.equal(s, 2 * x) for s in seen)


class Rows(Mapping):
    """Iterates over its rows, as a TensorDict, and one entry cannot be read."""

    def __init__(self, **columns):
        self.columns = columns

    def __getitem__(self, name):
        if name == "file":
            raise OSError("no such file")
        return self.columns[name]

    def __len__(self):
        return len(self.columns["x"])

    def __iter__(self):
        return iter([*self.columns["x"], "file"])


class Strict(Tensor):
    """Knows no functions."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        raise TypeError(f"no {function}")


def test_what_a_closure_does_not_read_is_left_alone():
    x, y = data()
    chain: Any = None
    for _ in range(2000):
        chain = Sample(chain, (chain,))
    strict = torch.ones(3).as_subclass(Strict)
    optimizer = make(model := mlp(torch.float64))
    batch = Rows(x=x, y=y), {"strict": strict, "chain": chain}
    optimizer.step(lambda b: (model(b[0]["x"]) - b[0]["y"]).square().mean(), batch)


class Queue(nn.Module):
    """Its forward writes to a buffer."""

    def __init__(self):
        super().__init__()
        self.layer = mlp(torch.float64)
        self.register_buffer("mean", torch.zeros(3, dtype=torch.float64))

    def forward(self, x):
        self.mean.mul_(0.9).add_(x.detach().mean(0))
        return self.layer(x + self.mean.clone())


@pytest.mark.parametrize("method", METHODS)
def test_parts_of_the_model_in_a_batch_may_change(method):
    """What a step perturbs and restores itself."""

    def reading(b):
        return (model(b[0]) - b[1]).square().mean() + (2 * b[2]).square().mean() + b[3].mean()

    found = []
    for inside in (True, False):
        optimizer = make(model := Queue(), method=method)
        weight, mean = model.layer[0].weight, model.mean
        if inside:
            optimizer.step(reading, (*data(), weight, mean[:2], weight.detach()))
        else:
            optimizer.step(lambda w=weight, m=mean: reading((*data(), w, m[:2])))
        found.append(snapshot(optimizer, model))
    same(*found)


def test_a_batch_closure_is_used_again_with_another_batch():
    """Parts are those of the batch that it has now."""
    found = []
    for again in (True, False):
        optimizer = make(model := mlp(torch.float64), flatness_fraction=0.5)
        b = {}
        closure = BatchClosure(lambda b, m=model: (m(b["x"]) - b["y"]).square().mean(), b)
        for seed in (1, 2):
            b["x"], b["y"] = batch(seed=seed, dtype=torch.float64)
            optimizer.step(closure if again else BatchClosure(closure.closure, b))
        found.append(snapshot(optimizer))
    same(*found)


def test_a_step_keeps_nothing_that_closures_put_into_a_part():
    optimizer = make(model := mlp(torch.float64), flatness_fraction=0.5)
    losses = []

    def closure(b):
        b["loss"] = (model(b["x"]) - b["y"]).square().mean()
        losses.append(weakref.ref(b["loss"]))
        return b["loss"]

    closure = BatchClosure(closure, dict(zip("xy", data(), strict=True)))
    gc.disable()
    try:
        optimizer.step(closure)
        assert [kept() is not None for kept in losses[1:]] == [False] * 4, "only the first pass filled the batch itself"
    finally:
        gc.enable()


def test_a_failed_step_keeps_nothing_of_its_batch_alive():
    optimizer = make(model := mlp(torch.float64))

    def closure(b):
        (model(b["x"]) - b["y"]).square().mean().backward()
        raise RuntimeError("bad batch")

    x, y = data()
    kept = weakref.ref(x)
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(RuntimeError, match="bad batch") as caught:
            optimizer.step(closure, {"x": x, "y": y})
        del caught, x, y
        assert kept() is None
    finally:
        gc.enable()


# Passes over the batches of a list.


def scaled_in_place(model, b):
    return (model(b[0].mul_(0.5)) - b[1]).square().mean()


def test_measures_name_a_list_of_batches_that_is_written_to():
    model = mlp(torch.float64)
    loss = flatness.over_batches(model, None, [data(), data()], batch_loss=scaled_in_place)
    with pytest.raises(RuntimeError, match=r"batch\[0\] .* was written to in place"):
        flatness.hessian_trace(loss, model.parameters(), samples=2)


def test_a_measure_that_fails_leaves_its_batches_as_they_were():
    x, y = data()
    model, batches = mlp(torch.float64), [(x, Sample(x, y))]

    def broken(model, b):
        b[1].y = None
        raise RuntimeError("no memory")

    loss = flatness.over_batches(model, None, batches, batch_loss=broken)
    with pytest.raises(RuntimeError, match="no memory"):
        flatness.hessian_trace(loss, model.parameters(), samples=2)
    assert batches[0][1].y is y


class Fresh:
    """Batches that are new in every pass."""

    def __iter__(self):
        return iter([data(), data()])


def test_measures_take_fresh_batches_that_are_written_to():
    model = nn.Linear(3, 2).double()

    def by(loader, batch_loss):
        loss = flatness.over_batches(model, None, loader, batch_loss=batch_loss)
        return flatness.hessian_eigenvalues(loss, model.parameters())

    expected = by([data(), data()], lambda model, b: (model(0.5 * b[0]) - b[1]).square().mean())
    torch.testing.assert_close(by(Fresh(), scaled_in_place), expected)
