"""A rank whose step failed alone, and which steps again where it must not: an error on all ranks, never other weights."""

from __future__ import annotations

import copy
from datetime import timedelta
from unittest.mock import patch

import pytest
import torch.distributed as dist
from gam_helpers import same
from rank_faults import GONE, WAYS, Fault, Training, hang_up
from ranks import agree, fingerprint, full, group, run

from gam_fused.torch_private import default_store

pytestmark = pytest.mark.processes


def is_stopped(training, where):
    """A rank that failed alone asks the others, for a second here, and ends."""
    before = training.now()
    default_store().set_timeout(timedelta(seconds=1))
    with pytest.raises(RuntimeError, match=rf"{where}, but not on all others.*End this rank"):
        training.step()
    same(training.now(), before)
    hang_up()


def is_left(training):
    """What the other one notices of that."""
    before = training.now()
    with pytest.raises(RuntimeError, match=GONE):
        training.step()
    same(training.now(), before)


def _steps_again_alone(rank, way, folder):
    for i, (number, place) in enumerate([(1, "hook"), (3, "backward")]):
        with group(rank, 2, f"{folder}/{i}"):
            training = Training(way, "finite_difference")
            training.step()
            if rank == 1:
                with pytest.raises(ValueError, match="a fault"):
                    training.step(Fault(number, place, ValueError))
                is_stopped(training, f"in pass {number + 1}")
            else:
                if (way, place) == ("global", "backward"):  # the other has given up after its last part in this step
                    training.step()
                is_left(training)


@pytest.mark.parametrize("way", ["global", "fsdp"])
def test_a_rank_that_steps_again_alone_is_stopped(way, tmp_path):
    run(2, _steps_again_alone, way, str(tmp_path))


def _update(rank, way, bad):
    """The base optimizer's own step raises on the ranks `bad`, when all have agreed on the direction."""
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
        assert agree(fingerprint(full(training.model.parameters())))
    elif rank in bad:
        is_stopped(training, "in the update")
    else:
        is_left(training)


@pytest.mark.parametrize("bad", [[1], [0, 1]])
@pytest.mark.parametrize("way", WAYS)
def test_after_an_update_that_failed_ranks_go_on_only_together(way, bad):
    """With "local" too: those whose update was made do not wait."""
    run(2, _update, way, bad)


def _elsewhere(rank):
    training = Training("global", "sam")
    with pytest.raises(ValueError, match="a fault"):
        training.step(Fault(0, "before", ValueError))
    training.optimizer.session.failed = f"in pass {1 + rank}"  # as where passes are launched and not waited for
    with pytest.raises(RuntimeError, match=r"rank 0: in pass 1, rank 1: in pass 2.*load a checkpoint"):
        training.step()
    training.optimizer.load_state_dict(training.optimizer.state_dict())
    training.step()
    assert agree(fingerprint(training.model.parameters()))


def test_ranks_that_failed_at_different_places_go_on_from_a_checkpoint():
    run(2, _elsewhere)


def _one_after_the_other(rank, between):
    """Both fail alone at the same step and place; in between, a checkpoint is loaded, or a copy takes the place."""
    training = Training("global", "finite_difference")
    training.step()
    saved = copy.deepcopy((training.model.state_dict(), training.optimizer.state_dict()))
    optimizers = {1: training.optimizer, 0: copy.copy(training.optimizer) if between == "copy" else training.optimizer}
    optimizers[0].generators = [training.noise]  # which a copy does not have
    default_store().set_timeout(timedelta(seconds=1))
    for bad, training.optimizer in optimizers.items():
        training.model.load_state_dict(saved[0])
        if between == "load":
            training.optimizer.load_state_dict(saved[1])
        if rank != bad:
            training.step()  # the other one gives up after its last part in this step
        else:
            with pytest.raises(ValueError, match="a fault"):
                training.step(Fault(3, "backward", ValueError))
            if bad == 0:
                is_stopped(training, "in pass 4")
                return
            with pytest.raises(RuntimeError, match="in pass 4, but not on all others"):
                training.step()
        if bad == 0:
            is_left(training)
        else:
            dist.barrier()


@pytest.mark.parametrize("between", ["load", "copy"])
def test_what_a_rank_told_of_an_earlier_failure_is_no_answer_to_another(between):
    run(2, _one_after_the_other, between)


def _together_then_alone(rank):
    training = Training("global", "finite_difference")
    training.step()
    with pytest.raises(ValueError, match="a fault"):
        training.step(Fault(3, "forward", ValueError))
    if rank:
        training.step()  # the other one gives up after its last part in this step
        is_left(training)
    else:
        with pytest.raises(ValueError, match="a fault"):
            training.step(Fault(3, "backward", ValueError))
        is_stopped(training, "in pass 4")


def test_what_all_told_of_a_failure_is_no_answer_to_the_next_at_that_step():
    run(2, _together_then_alone)
