"""Checks that look at tensors only where something differs from those that passed last."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

from gam_fused import torch_private
from gam_fused.memory.likeness import Remembered

CHANGES = {
    "sizes": lambda t: torch.zeros(3, 2),
    "strides": lambda t: torch.zeros(3, 2).t(),
    "dtype": lambda t: t.double(),
    "device": lambda t: t.to("meta"),
    "type": nn.Parameter,
    "nothing": lambda t: None,
    "no tensor": lambda t: 1.0,
    "layout": lambda t: t.to_sparse(),
    "conjugate": lambda t: torch.zeros(2, 3, dtype=torch.complex64).conj(),
}


def tensors():
    return [torch.zeros(4), torch.zeros(2, 3), torch.zeros(())]


@pytest.fixture
def asked():
    """Lists that the check was asked about."""
    return []


@pytest.fixture
def check(asked):
    def fit(given):
        asked.append(list(given))
        return len(asked) != 2

    return Remembered(fit)


@pytest.mark.parametrize("what", CHANGES)
def test_is_asked_again_where_something_differs(check, asked, what):
    assert check(tensors())
    assert check(tensors())
    assert len(asked) == 1, "other tensors that are alike were looked at"
    changed = tensors()
    changed[1] = CHANGES[what](changed[1])
    with torch.no_grad():
        assert not check(changed)
    assert asked[-1][1] is changed[1]


def test_what_has_not_passed_is_not_remembered(check, asked):
    other = [t.double() for t in tensors()]
    assert check(tensors())
    assert not check(other)
    assert check(other)
    assert len(asked) == 3
    assert check(other)
    assert len(asked) == 3


@pytest.mark.parametrize("guards", [None, lambda *tensors: None], ids=["not there", "of other arguments"])
def test_where_torch_compares_nothing_the_check_is_made_every_time(monkeypatch, check, asked, guards):
    monkeypatch.setattr(torch_private, "_Guards", guards)
    assert check(tensors())
    assert not check(tensors())
    assert check(tensors())
    assert len(asked) == 3


def test_no_tensors(check, asked):
    assert check([])
    assert not check([])


def test_tensors_that_passed_are_not_kept():
    tensor = torch.zeros(4)
    gone = weakref.ref(tensor)
    remembered = Remembered(lambda given: True)
    assert remembered([tensor])
    del tensor
    assert gone() is None
    assert remembered([torch.zeros(4)])
