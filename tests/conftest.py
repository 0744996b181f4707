"""Fixtures of all tests."""

from __future__ import annotations

import os

os.environ["GAM_FUSED_CHECK"] = "1"  # also for processes that tests start

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """Small problems: a second thread mostly waits for the first, the more so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
