"""Copies of tensors without a plain layout: which is put back, when the flag is asked, what is not written to."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
from gam_helpers import same
from torch.testing._internal.two_tensor import TwoTensor

from gam_fused.transaction.snapshots import AFTER, BEFORE, Snapshots, part

ROW = torch.arange(1.0, 7.0)
ODD = {
    "sparse": lambda: ROW.to_sparse().coalesce(),
    "quantized": lambda: torch.quantize_per_tensor(ROW, 0.5, 0, torch.quint8),
    "conjugate": lambda: torch.complex(ROW, ROW).conj(),
    "negative": lambda: torch._neg_view(ROW.clone()),
    "expanded": lambda: torch.ones(1).expand(6),
    "subclass": lambda: TwoTensor(ROW.clone(), ROW.clone()),
}


def numbers(t):
    t = t.a if isinstance(t, TwoTensor) else t
    t = t.dequantize() if t.is_quantized else t.to_dense()
    return t.resolve_conj().resolve_neg().clone()


@pytest.mark.filterwarnings("ignore:.*quantize.*")
@pytest.mark.parametrize("flag", [0.0, 1.0])
@pytest.mark.parametrize("kind", ODD)
def test_the_flag_decides_which_copy_is_put_back(kind, flag):
    t = ODD[kind]()
    snapshots, before = Snapshots([t]), numbers(t)
    snapshots.take(BEFORE)
    if kind == "quantized":
        t.copy_(2 * ROW)
    else:
        part(t).copy_(part(t).clone() * 2)
    after = numbers(t)
    assert not torch.equal(after, before)
    snapshots.take(AFTER)
    snapshots.choose(AFTER, BEFORE, torch.tensor(flag))
    snapshots.put_back(AFTER)
    same(numbers(t), before if flag else after)


def test_the_flag_is_asked_where_a_sparse_tensor_was_written_to_alone():
    snapshots = Snapshots([ODD["sparse"]()])
    snapshots.take(BEFORE)
    snapshots.take(AFTER)
    snapshots.choose(AFTER, BEFORE, torch.ones((), device="meta"))  # raises when asked


def test_a_sparse_tensor_that_nobody_wrote_to_is_not_written_to():
    t = ODD["sparse"]()
    snapshots, version = Snapshots([t]), t._version
    snapshots.take(BEFORE)
    snapshots.put_back(BEFORE)
    assert t._version == version


def test_memory_that_was_shrunk_by_one_element_grows_again():
    t = torch.ones(6)
    snapshots = Snapshots([t])
    snapshots.take(BEFORE)
    home = t.untyped_storage()
    t.data = torch.zeros(6)
    home.resize_(home.nbytes() - 4)
    snapshots.bring_home()
    assert t.untyped_storage().nbytes() == 24


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
def test_memory_that_a_sparse_buffer_has_left_is_kept():
    """Other values of as many elements would get it from the allocator, and be taken for the buffer's own."""
    array = np.ones(6)
    t = torch.sparse_coo_tensor(torch.arange(6)[None], torch.from_numpy(array), is_coalesced=True)
    memory = weakref.ref(array)
    del array
    snapshots = Snapshots([t])
    snapshots.take(BEFORE)
    torch.utils.swap_tensors(t, torch.zeros(6, dtype=torch.float64).to_sparse().coalesce())
    assert memory() is not None
    snapshots.put_back(BEFORE)
    same(t.to_dense(), torch.ones(6, dtype=torch.float64))
    del snapshots
    assert memory() is None
