"""Fixtures of all tests."""

from __future__ import annotations

import os

import pytest
import torch

# Fixtures of a module that take long to make, and the marker of the tests that need them.
MADE_ONCE = {"compiled": "nvcc", "rehearsal": "processes"}


def pytest_configure(config: pytest.Config) -> None:
    """Of processes that tests start. Their problems are small: a second thread mostly waits for the first."""
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks for groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Under pytest-xdist one process runs all tests that share such a fixture, and what takes long begins first."""
    for item in items:
        for name in MADE_ONCE.keys() & item.fixturenames:
            item.add_marker(MADE_ONCE[name])
            item.add_marker(pytest.mark.xdist_group(f"{item.path.stem}-{name}"))
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: not any(item.get_closest_marker(name) for name in MADE_ONCE.values()))


@pytest.fixture(autouse=True)
def _same_start():
    """One thread, too: see above; tests that take more need not put that back."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
