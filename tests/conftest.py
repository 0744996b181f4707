"""Fixtures of all tests."""

from __future__ import annotations

import os
import signal
from collections import Counter

os.environ["GAM_FUSED_CHECK"] = "1"  # also for processes that tests start

import pytest
import torch

# Fixtures of a module that take long to make, and the marker of the tests that need them.
LONG_FIXTURES = {"compiled": "nvcc", "rehearsal": "processes"}
LONG = ("nvcc", "processes", "frameworks")


def pytest_configure(config: pytest.Config) -> None:
    """What tests, and processes that they start, find."""
    os.environ["OMP_NUM_THREADS"] = "1"  # their problems are small: a second thread mostly waits for the first
    os.environ.pop("PYTEST_XDIST_WORKER", None)  # pytest-benchmark measures nothing where it sees this
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell leaves it to what it runs in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under pytest-xdist, which hands out files in this order, those that take long come first, then those of many tests."""
    for item in items:
        for name in LONG_FIXTURES.keys() & item.fixturenames:
            item.add_marker(LONG_FIXTURES[name])
    if hasattr(config, "workerinput"):
        count = Counter(item.path for item in items)
        long = {item.path for item in items if any(map(item.get_closest_marker, LONG))}
        items.sort(key=lambda item: (item.path not in long, -count[item.path], item.path))


@pytest.fixture(autouse=True)
def _same_start():
    """One thread, too; tests that take more need not put that back."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
