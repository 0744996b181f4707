"""The compiled operators of torch.ops with random arguments: an error or the right result, and never a crash.

Addresses are those of tensors, or 0: operators trust them (csrc/arguments.h). Every tensor has room for the widest dtype
and is followed by bytes that nothing may write to. Calls run in a process of their own, so that a crash is seen.
"""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from cases import _flat
from torch import Tensor

from gam_fused.backends import reference
from gam_fused.backends.operands import KERNELS
from gam_fused.backends.operators import DTYPES
from gam_fused.backends.tensor_lists import EMPTY, TensorList
from soak.turns import Turns

ROOT = Path(__file__).parents[1]
CALLS = 150  # of one process
GUARD = 64  # bytes
MARK = 0xA5


class Guarded:
    """Memory of tensors, and the bytes after each."""

    def __init__(self) -> None:
        self.guards: list[Tensor] = []

    def like(self, t: Tensor) -> Tensor:
        """A copy with room for float64, and a guard after that."""
        room = 8 * t.numel()
        memory = torch.full((room + GUARD,), MARK, dtype=torch.uint8)
        memory[:room] = 0
        self.guards.append(memory[room:])
        return memory[: t.numel() * t.element_size()].view(t.dtype).view(t.shape).copy_(t)

    def intact(self) -> bool:
        return all(bool((g == MARK).all()) for g in self.guards)


def operands(name: str, chance: random.Random, memory: Guarded) -> Any:
    """A record of the kernel whose lists lie in guarded memory."""
    from test_operators import Problem, record

    dtype = chance.choice(list(DTYPES))
    problem = Problem(chance.choice(["empty tensors", "0-dim", "chunk edges"]), dtype, dtype)
    made = record(name, problem)
    for field in KERNELS[name].lists:
        lst = getattr(made, field)
        if lst is not EMPTY:
            setattr(made, field, TensorList([None if t is None else memory.like(t) for t in lst.tensors]))
    for field in KERNELS[name].rest:
        if isinstance(value := getattr(made, field), Tensor) and value.is_contiguous():
            setattr(made, field, memory.like(value))
    return made


def spoil_tensor(t: Tensor, chance: random.Random) -> Tensor:
    """Something else than was asked for."""
    return chance.choice(
        [
            lambda: t[..., :-1] if t.dim() and t.shape[-1] else t.reshape(-1)[:0],
            lambda: torch.cat([t.reshape(-1), t.reshape(-1)]),
            lambda: t.reshape(-1)[:1],
            lambda: t.reshape(-1)[:0],
            lambda: t.to(torch.float32 if t.dtype == torch.float64 else torch.float64),
            lambda: t.to(torch.int32),
            lambda: t.to("meta"),
            lambda: t[None],
            lambda: t.reshape(-1)[:1].expand(t.shape) if t.numel() else t,
            lambda: torch.stack([t, t], -1)[..., 0],
            lambda: t.t() if t.dim() == 2 else t[None].t(),
            lambda: t.clone().requires_grad_() if t.is_floating_point() else t,
        ]
    )()


def spoiled(name: str, given: dict[str, Any], chance: random.Random) -> tuple[str, dict[str, Any]]:
    """The arguments with one of them changed, and which."""
    if chance.random() < 0.2:
        return overlapping(name, given, chance)
    what = chance.choice(list(given))
    value = given[what]
    if what == "chunk":
        value = chance.choice([-1, 0, 2**30, 2**30 + 1, 2**62, -(2**63)])
    elif what == "dtype":
        value = chance.choice([-1, 4, 2**31, 2**32, 2**62])
    elif what == "adaptive":
        value = not value
    elif isinstance(value, int):
        value = chance.choice([-1, 0, 1, 2, 3, 2**31, 2**32, 2**32 + 1])
    elif what == "layout" and chance.random() < 0.6:
        value = value.clone()
        row, column = chance.randrange(3), chance.randrange(value.shape[1])
        # Never more than the tensors hold: sizes go with addresses, which are trusted.
        value[row, column] = chance.choice([-1, -(2**62), 2**40] if row else [-1, -(2**62), -(2**33)])
    elif what in KERNELS[name].lists and value.numel() and chance.random() < 0.5:
        value = value.clone()
        value[chance.randrange(len(value))] = 0
    elif isinstance(value, Tensor):
        value = spoil_tensor(value, chance)
    return what, given | {what: value}


def overlapping(name: str, given: dict[str, Any], chance: random.Random) -> tuple[str, dict[str, Any]]:
    """Two operands in one memory: two lists that are the same tensors, or numbers of which some are the same."""
    from test_operators import numbers_of

    lists = [n for n in KERNELS[name].lists if given[n].numel() and KERNELS[name].lists[n].dtype != "counter"]
    numbers = list(numbers_of(name))
    if len(numbers) < 2 or (len(lists) > 1 and chance.random() < 0.5):
        first, second = chance.sample(lists, 2)
        return f"{first} and {second}", given | {second: given[first]}
    first, second = chance.sample(numbers, 2)
    a, b = given[first], given[second]
    begin = chance.randrange(a.numel())
    memory = torch.zeros(begin + a.numel() + b.numel(), dtype=torch.float64)
    shared = {n: memory[i:][: t.numel()].view(t.shape).copy_(t) for n, t, i in ((first, a, 0), (second, b, begin))}
    return f"{first} and {second}", given | shared


def harmless(what: str, before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Whether a change of arguments is one that must not change the result."""
    return what in ("workspace", "chunk", "map") or before.get(what, 0) is after.get(what, 1)


def must_be_refused(name: str, what: str) -> bool:
    """Whether the operands share numbers that the kernel writes to."""
    from test_operators import numbers_of

    written = numbers_of(name)
    return any(written.get(n) for n in what.split(" and ")) and " and " in what


def same_result(name: str, got: Any, wanted: Any) -> bool:
    written = [n for n, kind in (KERNELS[name].lists | KERNELS[name].rest).items() if getattr(kind, "written", False)]
    dtype = next(t.dtype for t in KERNELS[name].lists_of(wanted)[0].tensors if t is not None)
    error = max(1e-4, 4 * torch.finfo(dtype).eps)
    for field in written:
        value, right = getattr(got, field), getattr(wanted, field)
        if value is EMPTY or not isinstance(value, Tensor | TensorList):
            continue
        if field == "steps":  # of an empty tensor no kernel counts any
            value, right = (
                TensorList([t for t, n in zip(x.tensors, got.layout.sizes, strict=True) if n]) for x in (value, right)
            )
        a, b = _flat(value), _flat(right)
        if not torch.allclose(a, b, rtol=error, atol=error * max(1.0, float(b.abs().max()) if b.numel() else 0.0)):
            return False
    return True


def one_call(number: int, turn: int) -> tuple[str, str]:
    """Returns (outcome, what was done)."""
    from test_operators import arguments

    chance = random.Random(f"{number} {turn}")
    name, memory = chance.choice(list(KERNELS)), Guarded()
    state = chance.getstate()
    mine = operands(name, chance, memory)
    chance.setstate(state)
    twin = operands(name, chance, Guarded())
    valid = arguments(name, mine)
    what, given = spoiled(name, valid, chance)
    changed = [f"{describe(valid[n])} -> {describe(given[n])}" for n in what.split(" and ")]
    told = f"{name}, dtype {valid['dtype']}, {what}: {'; '.join(changed)}"
    try:
        getattr(torch.ops.gam_fused, name)(*given.values())
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        outcome = "refused" if str(error) else "refused without a word"
    else:
        outcome = "wrongly accepted" if must_be_refused(name, what) else "ran"
        if harmless(what, valid, given):
            getattr(reference, name)(twin)
            outcome = "right" if same_result(name, mine, twin) else "wrong"
    return (outcome if memory.intact() else "wrote beyond a tensor"), told


def describe(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)} {value.stride()} {value.device}" if isinstance(value, Tensor) else str(value)


def child(number: int, first: int, calls: int) -> None:
    """Calls, one line each: before it, so that a crash tells of it, and after."""
    torch.set_num_threads(1)
    for turn in range(first, first + calls):
        print(f"call {turn}", flush=True)
        outcome, told = one_call(number, turn)
        print(f"{outcome}|{told}", flush=True)


def run(seconds: float = float("inf"), number: int = 0, count: int | None = None, calls: int = CALLS) -> dict[str, Any]:
    """Process by process; the next goes on after the call at which the last one ended."""
    turns, outcomes, at = Turns("operators", seconds, count), Counter[str](), 0
    for _ in turns:
        code = f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]!r}\n"
        code += f"from soak.operators import child; child({number}, {at}, {calls})"
        limit = max(60.0, min(turns.left(), 600.0))
        try:
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired:
            turns.fail(f"calls from {at} on took more than {limit:.0f} s")
            break
        lines = done.stdout.splitlines()
        at += sum(line.startswith("call ") for line in lines)
        for line in lines:
            outcome, _, told = line.partition("|")
            if told:
                outcomes[outcome] += 1
            if told and outcome not in ("refused", "right", "ran"):
                turns.fail(f"{outcome}: {told} (number {number})")
        if done.returncode:
            outcomes["crashed"] += 1
            turns.fail(f"call {at - 1} of number {number} ended the process ({done.returncode}): {done.stderr[-1500:]}")
    return turns.figures(calls=at, outcomes=dict(outcomes))
