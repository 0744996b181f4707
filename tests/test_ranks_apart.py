"""A rank whose step failed alone, and which steps again where it must not: an error on all ranks, never other weights."""

from __future__ import annotations

from unittest.mock import patch

import pytest
from gam_helpers import same
from rank_faults import GONE, WAYS, Fault, Training
from ranks import agree, fingerprint, group, run

pytestmark = pytest.mark.processes
SHORT = 3.0  # seconds until a collective fails that not all ranks join


def _steps_again_alone(rank, way, folder):
    for i, (number, place) in enumerate([(1, "hook"), (3, "backward")]):
        with group(rank, 2, f"{folder}/{i}", SHORT):
            training = Training(way, "finite_difference")
            training.step()
            before = training.now()
            if rank == 1:
                with pytest.raises(ValueError, match="a fault"):
                    training.step(Fault(number, place, ValueError))
                with pytest.raises(RuntimeError, match=rf"in pass {number + 1}, but not on all others.*End this rank"):
                    training.step()
            else:
                if place == "backward" and way == "global":  # the other has given up after its last part in this step
                    training.step()
                    before = training.now()
                with pytest.raises(RuntimeError, match=GONE):
                    training.step()
            same(training.now(), before)


@pytest.mark.parametrize("way", ["global", "fsdp"])
def test_a_rank_that_steps_again_alone_is_stopped(way, tmp_path):
    run(2, _steps_again_alone, way, str(tmp_path))


def _update(rank, way, bad, folder):
    """The base optimizer's own step raises on the ranks `bad`, when all have agreed on the direction."""
    with group(rank, 2, f"{folder}/{way}", SHORT):
        training = Training(way, "sam", "foreign")
        training.step()
        if rank in bad:
            base = training.optimizer.base_optimizer
            with patch.object(base, "step", side_effect=MemoryError), pytest.raises(MemoryError):
                training.step()
        else:
            training.step()
        if len(bad) == 2:
            training.step()
            assert way == "fsdp" or agree(fingerprint(training.model.parameters()))
            return
        before = training.now()
        with pytest.raises(RuntimeError, match="in the update, but not on all others" if rank in bad else GONE):
            training.step()
        same(training.now(), before)


@pytest.mark.parametrize("bad", [[1], [0, 1]])
@pytest.mark.parametrize("way", WAYS)
def test_after_an_update_that_failed_ranks_go_on_only_together(way, bad, tmp_path):
    """With "local" too: those whose update was made do not wait."""
    run(2, _update, way, bad, str(tmp_path))


def _elsewhere(rank, folder):
    with group(rank, 2, f"{folder}/group", SHORT):
        training = Training("global", "sam")
        with pytest.raises(ValueError, match="a fault"):
            training.step(Fault(0, "before", ValueError))
        training.optimizer.session.failed = f"in pass {1 + rank}"  # as where passes are launched and not waited for
        with pytest.raises(RuntimeError, match=r"rank 0: in pass 1, rank 1: in pass 2.*load a checkpoint"):
            training.step()
        training.optimizer.load_state_dict(training.optimizer.state_dict())
        training.step()
        assert agree(fingerprint(training.model.parameters()))


def test_ranks_that_failed_at_different_places_go_on_from_a_checkpoint(tmp_path):
    run(2, _elsewhere, str(tmp_path))
