"""Threads, workers and processes beside a step. Steps nested in steps are in test_reentry_and_signals.py."""

from __future__ import annotations

import copy
import sys
import threading

import pytest
import torch
from gam_helpers import METHODS, backend_params, batch, closure_of, freeze, make, mixed_net, mlp, regression, same, weights
from torch import multiprocessing
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader, TensorDataset

from gam_fused import FusedGAM

WAIT = 120  # seconds until a process counts as hung


def trained(model, optimizer, steps: int, loss_fn=None):
    """Steps on batches of a seed each. Returns weights and state, frozen."""
    for i in range(steps):
        loss = loss_fn or regression(model, *batch(seed=i))
        optimizer.step(closure_of(optimizer, loss))
    return freeze([weights(optimizer), optimizer.state_dict()["state"]])


@pytest.mark.parametrize("backend", backend_params())
@pytest.mark.parametrize("method", METHODS)
def test_two_threads_get_the_bits_of_each_alone(method, backend):
    """They step at the same time, and switch often. Random numbers, which a process has once, the networks draw none."""

    def optimizer_of(seed):
        model = mlp(seed=seed)
        return model, make(model.parameters(), AdamW if seed else SGD, method, backend=backend, preserve_rng_state=False)

    expected = [trained(*optimizer_of(seed), 8) for seed in range(2)]
    pairs, found = [optimizer_of(seed) for seed in range(2)], [None, None]
    together, interval = threading.Barrier(2), sys.getswitchinterval()

    def run(i):
        together.wait(WAIT)
        found[i] = trained(*pairs[i], 8)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT)
    finally:
        sys.setswitchinterval(interval)
    same(found, expected)


@pytest.mark.processes
@pytest.mark.parametrize("moment", ["between steps", "during a step"])
def test_forked_workers_of_a_data_loader(moment):
    """Workers start, deliver and end between the passes of a step, as between steps; the bits are those without workers."""

    def train(workers):
        model = mixed_net()
        optimizer = FusedGAM(model, AdamW, lr=0.01)
        x, y = batch(32)
        torch.manual_seed(3)
        options = {"num_workers": workers, "multiprocessing_context": "fork"} if workers else {}
        loader = DataLoader(TensorDataset(x, y), batch_size=8, generator=torch.Generator(), **options)
        if moment == "between steps":
            for _ in range(2):
                for samples in loader:
                    optimizer.step(regression(model, *samples))
        else:
            for _ in range(2):
                optimizer.step(lambda: sum(regression(model, *samples)() for samples in loader))
        return freeze(model.state_dict())

    same(train(2), train(0))


def _goes_on(connection, model, optimizer) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(5)
    connection.send([t.tolist() for t in trained(model, optimizer, 3)[0]])


@pytest.mark.processes
@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.parametrize("backend", backend_params())
def test_a_process_started_after_a_step_goes_on(start, backend):
    """The child steps what it was given, to the bits of a copy that stays; the parent's weights are its own."""
    model = mlp()
    optimizer = make(model.parameters(), AdamW, backend=backend)
    trained(model, optimizer, 2)
    kept = copy.deepcopy((model, optimizer))
    before = weights(optimizer)
    context = multiprocessing.get_context(start)
    ours, theirs = context.Pipe()
    process = context.Process(target=_goes_on, args=(theirs, *copy.deepcopy((model, optimizer))))
    process.start()
    try:
        assert ours.poll(WAIT), "the child did not end"
        found = ours.recv()
    finally:
        process.join(WAIT)
    assert process.exitcode == 0
    torch.manual_seed(5)
    expected = [t.tolist() for t in trained(*kept, 3)[0]]
    assert found == expected
    same(weights(optimizer), before)
    same([t.tolist() for t in trained(model, optimizer, 3)[0]], expected)


def _hogwild(model, seed: int) -> None:
    torch.set_num_threads(1)
    optimizer = FusedGAM(model, SGD, lr=0.02, flatten=False)
    loss = regression(model, *batch(seed=seed))
    for _ in range(20):
        optimizer.step(loss)


@pytest.mark.processes
def test_a_model_in_shared_memory_is_stepped_in_place_by_one_process():
    """Its memory stays the shared one, so that others see the weights: `flatten=False`."""
    model = mlp().share_memory()
    expected = mlp()
    _hogwild(expected, 0)
    addresses = [p.data_ptr() for p in model.parameters()]
    process = multiprocessing.get_context("fork").Process(target=_hogwild, args=(model, 0))
    process.start()
    process.join(WAIT)
    assert process.exitcode == 0
    assert [p.data_ptr() for p in model.parameters()] == addresses
    same(freeze(model.state_dict()), freeze(expected.state_dict()))


@pytest.mark.processes
def test_hogwild_ends_with_finite_weights():
    """Two processes step one model without a lock: a pass may see the other's probe, and its return may undo an update.

    Nothing crashes and nothing becomes infinite; more is not promised.
    """
    model = mlp().share_memory()
    start = freeze(model.state_dict())
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_hogwild, args=(model, seed)) for seed in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(WAIT)
    assert [process.exitcode for process in processes] == [0, 0]
    assert all(t.isfinite().all() and t.is_shared() for t in model.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(freeze(model.state_dict()).values(), start.values(), strict=True))


def test_flatten_does_not_take_a_model_out_of_shared_memory():
    """Others would see no step any more. Shared after it was flattened, the model is stepped where it is."""
    with pytest.raises(ValueError, match=r"flatten=True.*parameter 0 of group 0.*shared with other processes"):
        FusedGAM(mlp().share_memory(), SGD, lr=0.1, flatten=True)
    model = mlp()
    optimizer = FusedGAM(model, SGD, lr=0.1, flatten=True)
    model.share_memory()
    addresses = [p.data_ptr() for p in model.parameters()]
    optimizer.step(regression(model, *batch()))
    assert [p.data_ptr() for p in model.parameters()] == addresses
    assert all(p.is_shared() for p in model.parameters())
