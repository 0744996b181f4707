"""A rank that dies or hangs in the middle of a step: an error on the others, and a restart from the last checkpoint."""

from __future__ import annotations

import signal
import time
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from gam_helpers import PASSES, same
from rank_faults import GONE, WAYS, Fault, Training
from ranks import run, run_to_their_ends
from torch.distributed.distributed_c10d import _set_pg_timeout

pytestmark = pytest.mark.processes
PLACES = ("before", "hook", "forward", "inside backward")
METHODS = {"global": ("finite_difference", "exact"), "local": ("accelerated",), "fsdp": ("finite_difference",)}
CASES = {way: [(method, k) for method in METHODS[way] for k in range(PASSES[method])] for way in WAYS}


def _dies(rank, way, method, number, folder):
    """Rank 1 is killed in the second step, after a checkpoint; rank 0 gets an error and keeps what it had."""
    warnings.simplefilter("ignore")  # of DCP, about plain tensors
    training = Training(way, method, "adamw")
    training.step()
    training.save(folder)
    before = training.now()
    with pytest.raises(RuntimeError, match=GONE):
        training.step(Fault(number, PLACES[number], signal.SIGKILL) if rank else None)
    same(training.now(), before)


def _restarted(rank, way, folder):
    """New processes, from the checkpoint: the bits of a training that nothing has disturbed."""
    warnings.simplefilter("ignore")
    for method, number in CASES[way]:
        twin = Training(way, method, "adamw")
        expected = [twin.step(), twin.step(), twin.step(), twin.now()][-1]
        training = Training(way, method, "adamw")
        training.load(f"{folder}/{method}-{number}")
        training.step()
        training.step()
        same(training.now(), expected, f"{method} {number}")


@pytest.mark.parametrize("way", WAYS)
def test_a_rank_that_is_killed_in_any_pass_and_a_restart(way, tmp_path):
    for method, number in CASES[way]:
        folder = Path(tmp_path, f"{method}-{number}")
        folder.mkdir()
        assert run_to_their_ends(2, _dies, way, method, number, str(folder)) == [0, -signal.SIGKILL], (method, number)
    run(2, _restarted, way, str(tmp_path))


def _hangs(rank, way, folder):
    """Rank 1 does not go on in its third pass; rank 0 waits for it no longer than the timeout of the process group."""
    over = Path(folder, "over")

    def hang(text):
        while not over.exists():
            time.sleep(0.05)
        return ValueError(text)

    def shorten(*_):
        if training.calls == 3:
            for each in {dist.group.WORLD, *training.groups()}:
                _set_pg_timeout(timedelta(seconds=1), each)

    training = Training(way, "finite_difference")
    training.step()
    before = training.now()
    if rank == 0:
        training.model.register_forward_pre_hook(shorten, prepend=True)
    with pytest.raises(ValueError if rank else RuntimeError, match="a fault" if rank else GONE):
        training.step(Fault(2, "hook", hang) if rank else None)
    over.touch()
    same(training.now(), before)


@pytest.mark.parametrize("way", WAYS)
def test_a_rank_that_hangs_is_an_error_on_the_others(way, tmp_path):
    run(2, _hangs, way, str(tmp_path))
