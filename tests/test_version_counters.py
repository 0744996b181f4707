"""What a step writes in place counts as changed for autograd, as under torch.optim: a backward through it is an error.

Kernels that torch does not know of have to tell. Backups, sums and gradients are the optimizer's own (gradients that
somebody else holds are copied, test_loss_and_gradients.py), and torch.optim writes to none.
"""

from __future__ import annotations

import pytest
import torch
from cases import BACKENDS, Problem, get_backend
from gam_helpers import METHODS, PASSES, backend_params, make
from interpreter import in_the_interpreter
from test_operators import record
from torch import nn
from torch.optim import SGD, Adam, AdamW, NAdam
from torch_optim import Linear

from gam_fused.backends import triton
from gam_fused.constants import Algorithm, Flag

SEEN_BY_OTHERS = {
    "perturb_": {"theta"},
    "combined_update_": {"theta", "state1", "state2", "state3", "steps"},
    "restore_": {"theta"},
}
STALE = "modified by an inplace operation"
BASES = {
    "SGD": (SGD, {"momentum": 0.9}),
    "Adam": (Adam, {"amsgrad": True}),
    "AdamW": (AdamW, {}),
    "NAdam": (NAdam, {}),
}


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("name", SEEN_BY_OTHERS)
def test_a_kernel_counts_what_it_writes(name, backend):
    p = Problem("many small", torch.float32, torch.float32, flags=Flag.AMSGRAD)
    operands = record(name, p)
    if name == "combined_update_":
        states = [p.values(seed, positive=True) for seed in (7, 8, 9)]
        operands.state1, operands.state2, operands.state3 = states
        operands.algorithm = Algorithm.ADAM
        assert operands.last.tensors[6] is operands.folded.tensors[6] is None
        for state in states:
            state.tensors[6] = None
    tensors = {
        (field, i): t
        for field in SEEN_BY_OTHERS[name]
        for i, t in enumerate(getattr(operands, field).tensors)
        if t is not None
    }
    before = {key: (t._version, t.clone()) for key, t in tensors.items()}
    getattr(get_backend(backend), name)(operands)
    changed = {key for key, t in tensors.items() if not torch.equal(t, before[key][1])}
    assert {field for field, _ in changed} == SEEN_BY_OTHERS[name]
    assert [key for key in changed if tensors[key]._version == before[key][0]] == []


@pytest.mark.processes
@pytest.mark.skipif(triton.INTERPRETED, reason="is what the test starts")
def test_kernels_of_triton_count_too():
    in_the_interpreter("triton and counts_what", "tests/test_version_counters.py")


@pytest.mark.parametrize("flatten", [False, True], ids=["", "flat"])
@pytest.mark.parametrize("backend", backend_params())
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_a_step_counts_what_torch_counts(method, base, backend, flatten):
    """Parameters and every entry of the state that a step of the optimizer alone would count."""
    kind, options = BASES[base]
    problem, other = Linear(), Linear()
    optimizer = make(problem.params, kind, method, backend=backend, flatten=flatten, **{"lr": 0.01, **options})
    plain = kind(other.params, **{"lr": 0.01, **options})
    for _ in range(3):
        loss, before = sum((p * p).sum() for p in problem.params), _versions(optimizer, problem)
        optimizer.step(problem)
        with pytest.raises(RuntimeError, match=STALE):
            loss.backward()
        other.bias.grad, other.weight.grad = torch.ones_like(other.bias), torch.ones_like(other.weight)
        theirs = _versions(plain, other)
        plain.step()
        counted = {k for k, v in _versions(plain, other).items() if k in theirs and v > theirs[k]}
        assert counted - {k for k, v in _versions(optimizer, problem).items() if k in before and v > before[k]} == set()
        assert {(0, ""), (1, "")} <= counted


def _versions(optimizer, problem):
    state = {(i, k): v for i, p in enumerate(problem.params) for k, v in optimizer.state[p].items()}
    parameters = {(i, ""): p for i, p in enumerate(problem.params)}
    return {k: v._version for k, v in (state | parameters).items() if isinstance(v, torch.Tensor)}


@pytest.mark.parametrize("backend", backend_params())
@pytest.mark.parametrize("method", [m for m in METHODS if m != "exact"])
def test_the_graph_of_a_pass_is_stale_in_the_next(method, backend):
    """Between two passes the weights move: what was computed before cannot be differentiated any more."""
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer, losses = make([weight], method=method, backend=backend), []

    def closure():
        if losses:
            with pytest.raises(RuntimeError, match=STALE):
                losses[-1].backward()
            weight.grad = None
        losses.append((weight * weight).sum())
        loss = (weight * weight).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert len(losses) == PASSES[method]
    with pytest.raises(RuntimeError, match=STALE):
        losses[-1].backward()


@pytest.mark.parametrize("backend", backend_params())
def test_the_graph_of_a_failed_pass_is_stale(backend):
    """Weights are put back after it: what it computed at the perturbed ones is no gradient of these."""
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer, losses = make([weight], backend=backend), []

    def closure():
        losses.append((weight * weight).sum())
        if len(losses) == 2:
            raise ValueError("a bad batch")
        return (weight * weight).sum()

    with pytest.raises(ValueError, match="a bad batch"):
        optimizer.step(closure)
    for loss in losses:
        with pytest.raises(RuntimeError, match=STALE):
            loss.backward()
