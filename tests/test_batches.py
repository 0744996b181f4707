"""`part_of`: the first samples of a mini-batch."""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict, UserDict, UserList, defaultdict, deque, namedtuple
from collections.abc import Mapping, MutableMapping
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence
from torch.utils.data import default_collate

from gam_fused import FusedGAM
from gam_fused.integrations import BatchClosure, all_micro_batches
from gam_fused.step.batches import part_of
from gam_fused.torch_private import tree_map_only

Pair = namedtuple("Pair", ["x", "y"])


def rows(n: int, *shape: int) -> Tensor:
    return torch.arange(n).view(-1, *([1] * len(shape))).expand(n, *shape).contiguous()


def is_part(t: Tensor, whole: Tensor, n: int) -> bool:
    """Whether `t` is the first n rows of `whole`, as a view."""
    return t.shape == (n, *whole.shape[1:]) and t.data_ptr() == whole.data_ptr() and t.stride() == whole.stride()


# How many samples.


@pytest.mark.parametrize(
    ("length", "fraction", "n"),
    [
        (64, 1 / 8, 8),
        (65, 1 / 8, 9),
        (10, 0.1, 2),
        (30, 0.1, 3),
        (100, 0.07, 7),  # the product is 7.000000000000001
        (49, 1 / 49, 2),
        (147, 3 / 147, 3),
        (16, 1 / 8, 2),
        (8, 1 / 8, 2),
        (3, 1 / 8, 2),
        (2, 1 / 8, 2),
        (3, 0.99, 3),
        (1, 1 / 8, 1),
        (0, 1 / 8, 0),
        (4, 1.0, 4),
    ],
)
def test_number_of_samples(length, fraction, n):
    x = rows(length, 3)
    assert is_part(part_of(x, fraction), x, n)


@pytest.mark.parametrize(("length", "fraction"), [(4, 1.0), (1, 0.5), (0, 0.5), (2, 0.5)])
def test_a_batch_that_is_given_whole_is_the_batch_itself(length, fraction):
    for batch in (rows(length), (rows(length), rows(length, 2)), {"x": rows(length)}):
        assert part_of(batch, fraction) is batch


def test_fraction_one_looks_at_nothing():
    batch = object()
    assert part_of(batch, 1.0) is batch


def test_gradients_reach_the_batch():
    x = torch.zeros(8, 2, requires_grad=True)
    part_of((x, rows(8)), 0.25)[0].sum().backward()
    assert x.grad.sum() == 4


# Which tensors.


def test_what_is_not_per_sample_stays_as_it_is():
    weights, scale, array = rows(5), torch.tensor(2.0), object()
    batch = {
        "x": rows(8, 3),
        "y": rows(8),
        "weights": weights,
        "scale": scale,
        "n": 8,
        "name": "a",
        "none": None,
        "o": array,
    }
    part = part_of(batch, 0.5)
    assert is_part(part["x"], batch["x"], 4)
    assert is_part(part["y"], batch["y"], 4)
    assert list(part) == list(batch)
    assert all(part[key] is batch[key] for key in ("weights", "scale", "n", "name", "none", "o"))
    assert batch["x"].shape == (8, 3), "the batch itself is not changed"


def test_the_length_is_that_of_most_tensors():
    short, x, y = rows(3, 4), rows(8, 2), rows(8)
    part = part_of((short, x, y), 0.5)
    assert part[0] is short
    assert is_part(part[1], x, 4)
    assert is_part(part[2], y, 4)


def test_a_subtree_without_samples_is_handed_on():
    constants = {"weights": rows(3)}
    assert part_of((rows(8), rows(8), constants), 0.5)[2] is constants


def test_a_tie_is_told():
    with pytest.raises(
        ValueError, match=r"8 or 5 samples\?.*batch\['x'\] \(8, 3\), batch\['more'\]\[1\] \(5,\)\. Keep what is not"
    ):
        part_of({"x": rows(8, 3), "more": [7, rows(5)]}, 0.5)


def test_a_tie_that_is_not_the_most():
    x, y, a, b = rows(8), rows(8), rows(3), rows(2)
    assert is_part(part_of((a, b, x, y), 0.5)[2], x, 4)


# Containers.


@dataclasses.dataclass
class Batch:
    x: Any
    y: Any = None
    size: int = 0


@dataclasses.dataclass(frozen=True)
class Frozen:
    inner: Any
    y: Tensor


@dataclasses.dataclass(frozen=True)
class Derived:
    x: Tensor
    double: Tensor = dataclasses.field(init=False)
    unset: Tensor = dataclasses.field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "double", self.x * 2)


@dataclasses.dataclass(frozen=True, slots=True)
class Slots:
    x: Tensor
    y: Tensor


@dataclasses.dataclass
class OwnInit:
    x: Tensor
    y: Tensor

    def __init__(self, both):
        self.x, self.y = both, both + 1


@dataclasses.dataclass
class Counting:
    x: Tensor

    def __post_init__(self):
        self.count = len(self.x)


class Attributes(dict):
    __getattr__ = dict.__getitem__


class Rows(list):
    pass


X, Y = rows(8, 2), rows(8)
NESTS = {
    "tuple": (X, Y),
    "list": [X, Y],
    "namedtuple": Pair(X, Y),
    "dict": {"x": X, "y": Y},
    "OrderedDict": OrderedDict(x=X, y=Y),
    "defaultdict": defaultdict(list, x=X, y=Y),
    "deque": deque([X, Y]),
    "UserDict": UserDict(x=X, y=Y),
    "UserList": UserList([X, Y]),
    "subclass of dict": Attributes(x=X, y=Y),
    "subclass of list": Rows([X, Y]),
    "mapping that cannot be changed": MappingProxyType({"x": X, "y": Y}),
    "dataclass": Batch(X, Y, 8),
    "frozen": Frozen({"a": X}, Y),
    "dataclasses": Frozen(Batch(X, (Y,)), Y),
    "slots": Slots(X, Y),
    "nest": ({"x": [X, {"y": Pair(Y, 1)}]}, Batch(X)),
}


def leaves(node: Any) -> list[Any]:
    if isinstance(node, Mapping):
        return [leaf for value in node.values() for leaf in leaves(value)]
    if isinstance(node, (tuple, list, deque, UserList)):
        return [leaf for value in node for leaf in leaves(value)]
    if dataclasses.is_dataclass(node):
        return [leaf for f in dataclasses.fields(node) for leaf in leaves(getattr(node, f.name))]
    return [node]


def types(node: Any) -> list[type]:
    if isinstance(node, Mapping):
        return [type(node), *(t for value in node.values() for t in types(value))]
    if isinstance(node, (tuple, list, deque, UserList)):
        return [type(node), *(t for value in node for t in types(value))]
    if dataclasses.is_dataclass(node):
        return [type(node), *(t for f in dataclasses.fields(node) for t in types(getattr(node, f.name)))]
    return [type(node)]


@pytest.mark.parametrize("name", NESTS)
def test_nests(name):
    batch = NESTS[name]
    part = part_of(batch, 0.25)
    assert types(part) == types(batch)
    for t, whole in zip(leaves(part), leaves(batch), strict=True):
        assert is_part(t, whole, 2) if isinstance(whole, Tensor) else t is whole
    assert all(len(t) == 8 for t in leaves(batch) if isinstance(t, Tensor)), "the batch itself is not changed"


def test_factories_stay():
    assert part_of(NESTS["defaultdict"], 0.25).default_factory is list


def test_fields_that_init_does_not_take():
    batch = Derived(X)
    part = part_of(batch, 0.25)
    assert is_part(part.x, X, 2)
    assert is_part(part.double, batch.double, 2)
    assert not hasattr(part, "unset")


def test_a_dataclass_with_an_init_of_its_own():
    batch = OwnInit(X)
    part = part_of(batch, 0.25)
    assert is_part(part.x, X, 2)
    assert is_part(part.y, batch.y, 2)


def test_what_a_dataclass_derives_of_its_fields_is_derived_anew():
    assert part_of(Counting(X), 0.25).count == 2


def test_default_collate_makes_one_batch():
    batch = default_collate([(torch.zeros(3), i) for i in range(8)])
    assert isinstance(batch, list)
    assert [len(t) for t in part_of(batch, 0.5)] == [4, 4]


class Node:
    def __init__(self, t, name):
        self.t, self.name = t, name


@pytest.fixture
def registered():
    torch.utils._pytree.register_pytree_node(Node, lambda n: ([n.t], n.name), lambda ts, name: Node(*ts, name))
    yield Node
    torch.utils._pytree._deregister_pytree_node(Node)


def test_registered_nodes(registered):
    part = part_of((registered(X, "a"), Y), 0.25)
    assert is_part(part[0].t, X, 2)
    assert part[0].name == "a"


def test_where_in_a_registered_node(registered):
    with pytest.raises(ValueError, match=r"batch\[0\]\[0\] \(8, 2\), batch\[1\]\.x \(3,\)"):
        part_of((registered(X, "a"), Batch(rows(3))), 0.25)


class Shared(MutableMapping):
    def __init__(self, items):
        self.items_ = items

    def __getitem__(self, key):
        return self.items_[key]

    def __setitem__(self, key, value):
        self.items_[key] = value

    def __delitem__(self, key):
        del self.items_[key]

    def __iter__(self):
        return iter(self.items_)

    def __len__(self):
        return len(self.items_)


class Copied(Shared):
    def __copy__(self):
        return Copied(copy.copy(self.items_))


def test_a_mapping_whose_copy_shares_its_items_is_not_changed():
    batch = Shared({"x": X, "y": Y})
    with pytest.raises(TypeError, match="a copy of a Shared shares its items: give it a __copy__"):
        part_of(batch, 0.25)
    assert batch["x"] is X
    assert batch["y"] is Y
    assert is_part(part_of(Copied({"x": X, "y": Y}), 0.25)["y"], Y, 2)


def test_a_registered_mapping_is_made_by_its_own_functions():
    torch.utils._pytree.register_pytree_node(
        Shared, lambda m: ([*m.values()], [*m]), lambda ts, keys: Shared(dict(zip(keys, ts, strict=True)))
    )
    try:
        assert is_part(part_of(Shared({"x": X, "y": Y}), 0.25)["y"], Y, 2)
    finally:
        torch.utils._pytree._deregister_pytree_node(Shared)


def test_a_class_is_no_container():
    @dataclasses.dataclass
    class Defaults:
        x: Tensor = Y

    assert part_of((Defaults, X), 0.25)[0] is Defaults


@pytest.mark.frameworks
def test_containers_of_transformers():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")
    encoding = transformers.BatchEncoding({"input_ids": X, "labels": Y})
    part = part_of(encoding, 0.25)
    assert type(part) is transformers.BatchEncoding
    assert is_part(part.input_ids, X, 2)
    assert is_part(encoding["labels"], Y, 8)
    output = transformers.modeling_outputs.SequenceClassifierOutput(loss=torch.tensor(1.0), logits=X)
    part = part_of((output, Y), 0.25)[0]
    assert type(part) is type(output)
    assert part.loss is output.loss
    assert is_part(part.logits, X, 2)


# Closures with a batch.


def test_a_batch_is_cut_once_per_step():
    cuts = []

    def cut(batch, fraction):
        cuts.append(fraction)
        return part_of(batch, fraction)

    closure = BatchClosure(len, X, cut)
    assert [closure(), closure.on_part(0.5), closure.on_part(0.5), closure(), closure.on_part(0.25)] == [8, 4, 4, 8, 2]
    assert cuts == [0.5, 0.25]


def test_a_way_of_cutting_of_ones_own():
    """What `part_of` would take for one batch of eight, a list of samples of different size."""
    samples = [rows(8, 2), rows(8, 3), rows(8, 4), rows(8, 5)]
    model, seen = torch.nn.Linear(1, 1), []

    def closure(samples):
        seen.append(len(samples))
        return sum(model(t[:1, :1].float()).square().sum() for t in samples) / len(samples)

    optimizer = FusedGAM(model, torch.optim.SGD, lr=0.1, flatness_fraction=0.5)
    optimizer.step(BatchClosure(closure, samples, lambda batch, fraction: batch[: int(len(batch) * fraction)]))
    assert seen == [4, 2, 2, 2, 2]


def test_all_micro_batches_keeps_the_batch_and_its_cut():
    marked = all_micro_batches(BatchClosure(len, [1, 2, 3, 4], lambda batch, fraction: batch[:1]))
    assert isinstance(marked, BatchClosure)
    assert (marked(), marked.on_part(0.5)) == (4, 1)
    assert all_micro_batches(len)(X) == 8


def test_a_batch_without_a_function_is_an_error():
    model = torch.nn.Linear(1, 1)
    with pytest.raises(TypeError, match=r"step takes a function that computes the loss.*not a Tensor"):
        FusedGAM(model, torch.optim.SGD, lr=0.1).step(torch.zeros(1), X)
    with pytest.raises(RuntimeError, match=r"step needs a closure"):
        FusedGAM(model, torch.optim.SGD, lr=0.1).step(None, X)


# Micro-batches.


def test_micro_batches_are_cut_each():
    batches = [(rows(8, 2), rows(8)), (rows(8, 2), rows(8)), (rows(5, 2), rows(5)), (rows(1, 2), rows(1))]
    parts = part_of(batches, 0.5)
    assert type(parts) is list
    assert [[len(t) for t in part] for part in parts] == [[4, 4], [4, 4], [3, 3], [1, 1]]
    assert parts[3] is batches[3]


@pytest.mark.parametrize("kind", ["list", "dict", "dataclass", "UserDict", "namedtuple"])
def test_kinds_of_micro_batches(kind):
    batches = [copy.copy(NESTS[kind]), tree_map_only(Tensor, lambda t: t[:4], NESTS["tuple"])]
    parts = part_of(batches, 0.5)
    assert type(parts[0]) is type(batches[0])
    assert [len(t) for part in parts for t in leaves(part) if isinstance(t, Tensor)] == [4, 4, 2, 2]


def test_one_element_that_is_no_micro_batch_makes_the_list_one_batch():
    for other in ("a", None, {}, {"scale": torch.tensor(1.0)}, rows(8)):
        batch = [(rows(8), rows(8)), (rows(3),), other]
        part = part_of(batch, 0.5)
        assert len(part[0][0]) == 4
        assert part[1] is batch[1]


def test_a_tuple_is_one_batch():
    assert [len(t) for (t,) in part_of(((rows(8),), (rows(8),), (rows(4),)), 0.5)] == [4, 4, 4]


def test_errors_in_a_micro_batch_tell_which():
    with pytest.raises(ValueError, match=r"4 or 3.*batch\[1\]\[0\] \(4,\), batch\[1\]\[1\] \(3,\)"):
        part_of([(rows(8), rows(8)), (rows(4), rows(3))], 0.5)


# What cannot be cut.


@pytest.mark.parametrize(
    "batch", [None, "a", 1.0, {}, [], (), {"a": None}, torch.tensor(1.0), [torch.tensor(1.0)], Node(X, "")]
)
def test_no_tensor(batch):
    with pytest.raises(TypeError, match=f"batch is a {type(batch).__name__} without a tensor.*register_pytree_node"):
        part_of(batch, 0.5)


def test_packed_sequences():
    for packed in (pack_sequence([torch.zeros(3), torch.zeros(2)]), pack_padded_sequence(torch.zeros(3, 2, 1), [3, 2])):
        with pytest.raises(TypeError, match=r"batch\['x'\] is a PackedSequence.*pack them in the closure"):
            part_of({"x": packed, "y": Y}, 0.5)
        with pytest.raises(TypeError, match=r"batch\[0\]\[0\] is a PackedSequence"):
            part_of([(packed, Y), (packed, Y)], 0.5)


@pytest.mark.filterwarnings("ignore:.*nested tensors.*")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_nested_tensors(layout):
    nested = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=layout)
    with pytest.raises(TypeError, match=r"batch\[1\]\.x is a nested tensor.*padded"):
        part_of((Y, Batch(nested)), 0.5)


@pytest.mark.filterwarnings("ignore:Sparse")
def test_sparse_tensors():
    for sparse in (torch.eye(8).to_sparse(), torch.eye(8).to_sparse_csr()):
        with pytest.raises(TypeError, match=r"batch\[0\] is a sparse tensor.*dense"):
            part_of((sparse, Y), 0.5)
