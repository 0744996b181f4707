"""torch.distributed.checkpoint: every way of saving, resharding, and a run that is killed again and again."""

from __future__ import annotations

import copy
import os
import random
import signal
import tempfile
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from gam_helpers import batch, bits, close, closure_of, freeze, make, same
from ranks import FORKED, agree, full, loss_of, net, run, shard
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh

from gam_fused.parallel.dtensor import local
from gam_fused.schedules import ProportionalRho

pytestmark = pytest.mark.processes
BASES = {
    "sgd": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    "adam": (torch.optim.Adam, {"lr": 0.01, "amsgrad": True}),
    "foreign": (torch.optim.NAdam, {"lr": 0.01}),
}
WAYS = {
    "plain": StateDictOptions(),
    "flattened": StateDictOptions(flatten_optimizer_state_dict=True),
    "cpu_offload": StateDictOptions(cpu_offload=True),
    "full": StateDictOptions(full_state_dict=True, cpu_offload=True),
}


def build(seed=0, sharded=True, base="sgd", dtype=torch.float64, **options):
    """A model, its optimizer in the middle of nothing, and the closure of a step; two groups of different rho."""
    model = net(dtype, seed)
    if sharded:
        shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    groups = [
        {"params": list(model[0].parameters()), "rho": 0.2},
        {"params": [*model[2].parameters(), *model[4].parameters()]},
    ]
    kind, base_options = BASES[base]
    optimizer = make(groups, kind, "accelerated", model=model, interval=3, **base_options, **options)
    return model, optimizer, closure_of(optimizer, loss_of(model, *batch(outputs=1, dtype=dtype)))


def gather(model, optimizer, options):
    return {
        "model": get_model_state_dict(model, options=options),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }


def restore(model, optimizer, saved, options):
    set_model_state_dict(model, saved["model"], options=options)
    set_optimizer_state_dict(model, optimizer, saved["optimizer"], options=options)


def shards(model):
    return [bits(local(p)) for p in model.parameters()]


# -- round trips ------------------------------------------------------------------------------------------------------


def _round_trips(rank, folder):
    """Saved in the middle of an interval, of schedules, after a skipped step; the resumed run makes the same bits.

    In float32: torch.optim casts whatever state it loads to the parameter's dtype, and NAdam's begins as float32.
    """
    warnings.simplefilter("ignore")
    data = batch(outputs=1)
    for way, options in WAYS.items():
        for base in BASES if way in ("plain", "flattened") else ("adam",):
            model, optimizer, closure = build(base=base, dtype=torch.float32)
            loss_fn = loss_of(model, *data)
            optimizer.step(lambda loss_fn=loss_fn: loss_fn() * float("nan"))
            for _ in range(4):
                optimizer.step(closure)
            optimizer.gamma, optimizer.param_groups[0]["rho"] = 0.7, 0.11
            saved = gather(model, optimizer, options)
            if way == "full":  # rank 0 has all of it; the others nothing
                path = Path(folder, f"full-{base}.pt")
                if rank == 0:
                    torch.save(saved, path)
                dist.barrier()
                saved = torch.load(path, weights_only=True)
            else:
                path = Path(folder, f"{way}-{base}")
                dcp.save(saved, checkpoint_id=path)
            other, resumed, its_closure = build(seed=7, base=base, dtype=torch.float32)
            if way != "full":
                saved = gather(other, resumed, options)
                dcp.load(saved, checkpoint_id=path)
            restore(other, resumed, saved, options)
            assert (resumed.session.steps_taken, resumed.gamma, resumed.param_groups[0]["rho"]) == (5, 0.7, 0.11), (
                way,
                base,
            )
            assert resumed.skipped_steps == 1
            for _ in range(4):
                optimizer.step(closure), resumed.step(its_closure)
            same(shards(other), shards(model), f"{way} {base}")


def test_every_way_of_saving_resumes_bit_for_bit(tmp_path):
    run(2, _round_trips, str(tmp_path))


def _save(rank, folder):
    warnings.simplefilter("ignore")
    for base in BASES:
        for way in ("plain", "flattened"):
            model, optimizer, closure = build(base=base)
            for _ in range(4):
                optimizer.step(closure)
            dcp.save(gather(model, optimizer, WAYS[way]), checkpoint_id=Path(folder, f"{way}-{base}"))


def _load_and_go_on(rank, source, target):
    """Loads on this many ranks, goes on for two steps, saves; returns the whole weights."""
    warnings.simplefilter("ignore")
    results = {}
    for base in BASES:
        for way in ("plain", "flattened"):
            model, optimizer, closure = build(seed=7, base=base)
            saved = gather(model, optimizer, WAYS[way])
            dcp.load(saved, checkpoint_id=Path(source, f"{way}-{base}"))
            restore(model, optimizer, saved, WAYS[way])
            for _ in range(2):
                optimizer.step(closure)
            dcp.save(gather(model, optimizer, WAYS[way]), checkpoint_id=Path(target, f"{way}-{base}"))
            results[way, base] = full(model.parameters())
    return results


def test_resharded_from_two_to_one_to_three_ranks(tmp_path):
    first, second, third = (tmp_path / name for name in ("two", "one", "three"))
    run(2, _save, str(first))
    run(1, _load_and_go_on, str(first), str(second))
    results = run(3, _load_and_go_on, str(second), str(third))
    for base in BASES:
        model, optimizer, closure = build(sharded=False, base=base)
        for _ in range(8):
            optimizer.step(closure)
        for way in ("plain", "flattened"):
            for result in results:
                close(result[way, base], list(model.parameters()), 1e-10, f"{way} {base}")


def _between_optimizers(rank, folder):
    """torch.optim -> FusedGAM at alpha = 0 (the base optimizer itself) -> torch.optim, all by distributed checkpoints."""
    warnings.simplefilter("ignore")
    data = batch(outputs=1, dtype=torch.float64)
    for name, kind in {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}.items():
        options = {"lr": 0.01} | ({"momentum": 0.9} if kind is torch.optim.SGD else {})

        def make_one(gam, kind=kind, options=options):
            model = shard(net(), mesh=init_device_mesh("cpu", (2,)))
            params = model.parameters()
            optimizer = make(params, kind, alpha=0.0, **options) if gam else kind(params, **options)
            return model, optimizer, closure_of(optimizer, loss_of(model, *data))

        straight, plain, closure = make_one(False)
        for _ in range(9):
            plain.step(closure)
        path = None
        for leg, gam in enumerate((False, True, False)):
            model, optimizer, closure = make_one(gam)
            if path:
                saved = gather(model, optimizer, None)
                dcp.load(saved, checkpoint_id=path, planner=DefaultLoadPlanner(allow_partial_load=True))
                restore(model, optimizer, saved, None)
            for _ in range(3):
                optimizer.step(closure)
            path = Path(folder, f"{name}-{leg}")
            dcp.save(gather(model, optimizer, None), checkpoint_id=path)
        close(full(model.parameters()), full(straight.parameters()), 1e-10, name)
        assert agree(len(optimizer.state))


def test_checkpoints_of_torch_optimizers_load_and_go_back(tmp_path):
    run(2, _between_optimizers, str(tmp_path))


# -- killed again and again -------------------------------------------------------------------------------------------


KILLED = {
    "adamw": (torch.optim.AdamW, {}),
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.5}),
    "foreign": (torch.optim.RMSprop, {}),
}


class Run:
    """A training run with everything that has to survive: dropout, batch norm, two schedules, an interval."""

    LENGTH = 400

    def __init__(self, base):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 2))
        kind, options = KILLED[base]
        self.optimizer = make(self.model.parameters(), kind, model=self.model, interval=3, lr=0.01, **options)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, self.LENGTH)
        self.radius = ProportionalRho(self.optimizer, max_rho=0.3, min_rho=0.05)
        self.parts = {k: v for k, v in vars(self).items() if hasattr(v, "load_state_dict")}
        self.step_number = 0

    def step(self):
        x, y = torch.randn(8, 3), torch.randn(8, 2)
        self.optimizer.step(lambda: (self.model(x) - y).square().mean())
        self.scheduler.step()
        self.radius.step()
        self.step_number += 1

    def save(self, path):
        """Written beside the old one and moved over it: at any moment there is one whole checkpoint."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        torch.save(state | {"rng": torch.get_rng_state(), "step_number": self.step_number}, f"{path}.new")
        os.replace(f"{path}.new", path)

    def load(self, path):
        state = torch.load(path, weights_only=True)
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        torch.set_rng_state(state["rng"])
        self.step_number = state["step_number"]

    def finish(self, path=None):
        while self.step_number < self.LENGTH:
            self.step()
            if path and self.step_number % 5 == 0:
                self.save(path)
        if path:
            self.save(path)

    def frozen(self):
        return freeze({name: copy.deepcopy(part.state_dict()) for name, part in self.parts.items()})


def _resume(path, base):
    torch.set_num_threads(1)
    run_ = Run(base)
    if os.path.exists(path):
        run_.load(path)
    run_.finish(path)


def _in_a_process(path, base):
    """The state at the end of a run from `path` on. Always in a process of its own: with the same number of threads, and
    nothing that other tests have set."""
    process = FORKED.Process(target=_resume, args=(path, base))
    process.start()
    process.join()
    assert process.exitcode == 0
    run_ = Run(base)
    run_.load(path)
    return run_.frozen()


def kill_and_resume(times, base="adamw", number=0):
    """A run that is killed so many times and goes on from its checkpoint ends in the bits of one that is not."""
    moments, kills, steps_seen = random.Random(number), 0, set()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "checkpoint.pt")
        while kills < times:
            process = FORKED.Process(target=_resume, args=(path, base))
            process.start()
            before = _step_of(path)
            if moments.random() < 0.3:  # perhaps before it has loaded anything
                time.sleep(moments.uniform(0, 0.1))
            else:  # in the middle of passes, of updates, of writing a checkpoint
                while process.is_alive() and _step_of(path) == before:
                    time.sleep(0.001)
                time.sleep(moments.uniform(0, 0.01))
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
            process.join()
            steps_seen.add(_step_of(path))
            assert process.exitcode != 0, f"the run was over after {kills} kills, at steps {sorted(steps_seen)}"
        resumed, straight = _in_a_process(path, base), _in_a_process(os.path.join(folder, "straight.pt"), base)
    assert len(steps_seen) > times * 0.4
    same(resumed, straight)


def test_a_run_killed_twenty_times_ends_in_the_same_bits():
    kill_and_resume(20)


def _step_of(path):
    return torch.load(path, weights_only=True)["step_number"] if os.path.exists(path) else 0
