"""What a captured graph reads of the host: filled in once, when the capture is over."""

from __future__ import annotations

import pytest
import torch

from gam_fused.backends import uploads
from gam_fused.backends.tensor_lists import Layout, TensorList
from gam_fused.backends.uploads import GraphNumbers, upload

CPU = torch.device("cpu")
VALUES = [
    torch.arange(5),
    torch.tensor([[True, False, True]]),
    torch.tensor([0.1, -0.0, 3.0], dtype=torch.float64),
    torch.tensor(0.5),
    torch.tensor([1.5, 2.5, 3.5], dtype=torch.bfloat16),
    torch.empty(0, dtype=torch.int64),
]


def test_numbers_of_all_kinds_are_there_after_the_capture():
    numbers = GraphNumbers(CPU, 32)
    taken = [numbers.take(v) for v in VALUES]
    assert not any(t.any() for t in taken), "nothing is copied while a graph is captured"
    numbers.fill()
    for t, v in zip(taken, VALUES, strict=True):
        assert (t.dtype, t.shape) == (v.dtype, v.shape)
        assert torch.equal(t, v)
    assert numbers.suffices


def test_the_same_numbers_take_memory_once():
    numbers = GraphNumbers(CPU, 8)
    first, again, other = (numbers.take(v) for v in (torch.arange(3), torch.arange(3), torch.arange(3).double()))
    assert first.data_ptr() == again.data_ptr() != other.data_ptr()
    assert numbers.needed == 6


def test_too_little_memory_is_told():
    numbers = GraphNumbers(CPU, 4)
    numbers.take(torch.arange(3))
    assert numbers.take(torch.arange(2)).shape == (2,)
    assert not numbers.suffices
    assert numbers.needed == 5


@pytest.fixture
def capturing(monkeypatch):
    """Everything is being captured, on "meta" tensors."""
    monkeypatch.setattr(uploads, "is_capturing", lambda device: True)
    monkeypatch.setattr("gam_fused.backends.tensor_lists.is_capturing", lambda device: True)
    return torch.device("meta")


def test_addresses_sent_while_capturing_are_the_graphs_alone(capturing):
    numbers = GraphNumbers(capturing, 64)
    lst, layout = TensorList([torch.ones(2), torch.ones(3)], lasting=True), Layout([2, 3], [0, 0], [True, True])
    with numbers:
        assert lst.on(capturing) is lst.on(capturing)
        assert layout.on(capturing) is layout.on(capturing)
    assert numbers.needed == 2 + 3 * 3 + 1
    with GraphNumbers(capturing, 64):
        assert lst.on(capturing).untyped_storage()._cdata != numbers._memory.untyped_storage()._cdata


def test_a_capture_of_the_users_own_is_told_to_use_ours(capturing):
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"gam_fused\.graphs\.capture_step"):
            upload(torch.arange(3), capturing)
        with GraphNumbers(capturing, 4):  # the graph's, while it is captured
            upload(torch.arange(3), capturing)
