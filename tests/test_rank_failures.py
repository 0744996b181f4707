"""A step that fails on one rank, or on all, in the middle: nothing is lost there, and nobody goes on with other weights."""

from __future__ import annotations

import re

import pytest
import torch
from gam_helpers import same
from rank_faults import EVERY_PASS, GONE, PLACES, WAYS, Fault, Training, hang_up
from ranks import agree, fingerprint, group, run
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import FSDPModule

pytestmark = pytest.mark.processes
ERRORS = (ValueError, torch.OutOfMemoryError, KeyboardInterrupt, SystemExit)

# What DDP says of a backward that did not end: two for an exception in backward, the last for one in a hook of its own.
DDP_IS_STUCK = r"Expected to (have finished reduction|mark a variable ready)|unmarked_param_indices"


def faults(way, places=PLACES):
    """A fault for every pass of every method; places and exceptions take turns."""
    turns = [(places[i % len(places)], ERRORS[(i // len(places) + i) % len(ERRORS)]) for i in range(len(EVERY_PASS))]
    for (w, method, k), (place, error) in zip(EVERY_PASS, turns, strict=True):
        if w == way:  # a closure of `exact` does not call backward
            yield method, Fault(k, "forward" if (method, place) == ("exact", "backward") else place, error)


def fails(training, fault):
    """The step raises what it shall, and leaves this rank as it was."""
    before = training.now()
    with pytest.raises(RuntimeError if fault is None or fault.place == "collective" else fault.error) as caught:
        training.step(fault)
    same(training.now(), before, f"{training.method} {fault}")
    return str(caught.value)


def _one_rank(rank, way, folder):
    for i, (method, fault) in enumerate(faults(way)):
        with group(rank, 2, f"{folder}/{i}"):
            training = Training(way, method)
            training.step()
            error = fails(training, fault if rank == i % 2 else None)
            if rank == i % 2:
                hang_up()
            else:
                assert re.search(GONE, error), error


@pytest.mark.parametrize("way", WAYS)
def test_a_failure_on_one_rank_is_undone_there_and_an_error_on_the_others(way, tmp_path):
    """Where the rank that failed ends, or its connections do. The others' collectives fail in the middle of their pass."""
    run(2, _one_rank, way, str(tmp_path))


def _all_ranks(rank, way):
    expected = {}
    places = [p for p in PLACES if p != "collective" and (way, p) != ("global", "inside backward")]
    for method, fault in faults(way, places):
        if method not in expected:
            twin = Training(way, method)
            expected[method] = [twin.step(), twin.step(), twin.now()][-1]
        training = Training(way, method)
        training.step()
        fails(training, fault)
        training.step()
        same(training.now(), expected[method], f"{method} {fault}")


@pytest.mark.parametrize("way", WAYS)
def test_after_a_failure_on_all_ranks_training_goes_on_to_the_same_bits(way):
    run(2, _all_ranks, way)


def _inside_backward_of_ddp(rank, place):
    """DDP's reducer waits for gradients that never come, and says so; wrapped anew, training goes on to the same bits."""
    twin = Training("global", "sam", "adamw")
    with_hook(twin)
    expected = [twin.step(), twin.step(), twin.now()][-1]
    training = Training("global", "sam", "adamw")
    with_hook(training)
    training.step()
    fails(training, Fault(1, place, ValueError))
    before = training.now()
    with pytest.raises(RuntimeError, match=DDP_IS_STUCK):
        training.step()
    same(training.now(), before)
    training.wrap_anew()
    with_hook(training)
    training.step()
    same(training.now(), expected)


@pytest.mark.parametrize("place", ["inside backward", "comm hook"])
def test_after_a_failure_inside_backward_ddp_is_wrapped_anew(place):
    run(2, _inside_backward_of_ddp, place)


def with_hook(training):
    """DDP averages by a hook of the user's, which may fail."""

    def average(training, bucket):
        training.strike("comm hook")
        return allreduce_hook(training.model.process_group, bucket)

    training.model.register_comm_hook(training, average)


def _comm_hook(rank, folder):
    for i, (way, method, k) in enumerate(EVERY_PASS):
        if way == "global" and method != "exact":
            with group(rank, 2, f"{folder}/{i}"):
                training = Training(way, method)
                with_hook(training)
                training.step()
                error = fails(training, Fault(k, "comm hook", ValueError) if rank == i % 2 else None)
                if rank == i % 2:
                    hang_up()
                else:
                    assert re.search(GONE, error), error


def test_a_comm_hook_that_fails_on_one_rank_is_undone_there_and_an_error_on_the_others(tmp_path):
    run(2, _comm_hook, str(tmp_path))


def _in_older_versions(rank):
    del FSDPModule.reset_iter_state
    for places in (["hook"], ["inside backward"]):
        twin = Training("fsdp", "sam")
        expected = [twin.step(), twin.now()][-1]
        for method, fault in faults("fsdp", places):
            if method == "sam":
                training = Training("fsdp", method)
                fails(training, fault)
                training.step()
                same(training.now(), expected, f"{fault}")


@pytest.mark.skipif(not hasattr(FSDPModule, "reset_iter_state"), reason="this torch is such a version")
def test_fsdp_goes_on_in_versions_of_torch_that_do_not_offer_that():
    run(2, _in_older_versions)


def _steps_again(rank, bad):
    for method, fault in faults("local", PLACES[:-1]):
        twin = Training("local", method)
        expected = [twin.step(), twin.step(), twin.step(), twin.now()][-1]
        training = Training("local", method)
        for step in range(3):
            if rank == bad and step:
                fails(training, fault)
            training.step()
        same(training.now(), expected, f"{method} {fault}")
        assert agree(fingerprint(training.model.parameters()))


@pytest.mark.parametrize("bad", [0, 1])
def test_with_local_a_rank_whose_step_failed_may_step_again(bad):
    """The others wait for it. Buffers are broadcast once per step: here those of batch norm, from rank 0."""
    run(2, _steps_again, bad)
