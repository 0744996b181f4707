"""A training over several ranks in which one of them is made to fail, at any place of any pass of a step."""

from __future__ import annotations

import gc
import os
import random
import signal
import socket
import stat
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from gam_helpers import METHODS, PASSES, Struck, batch, bits, freeze, make, mixed_net
from ranks import shard_of
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from gam_fused.parallel.dtensor import local

WAYS = {"global": METHODS, "local": METHODS, "fsdp": tuple(m for m in METHODS if m != "exact")}
EVERY_PASS = [(way, method, k) for way, methods in WAYS.items() for method in methods for k in range(PASSES[method])]
BASES: dict[str, tuple[Any, dict]] = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "lr": 0.01}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-3}),
    "foreign": (torch.optim.NAdam, {"lr": 1e-3}),
}
# Where a step may fail. "collective": what this rank says next to the others does not arrive, as where one of them is gone.
PLACES = ("before", "forward", "hook", "inside backward", "backward", "collective")

GONE = r"(?i)timed out|timeout|closed|closure|reset by peer|read error|broken pipe"  # what gloo says of a rank that is gone


class Fault(NamedTuple):
    """In which pass, where, and what is raised, or added to one element."""

    number: int
    place: str
    error: Any


class Spoilt(torch.autograd.Function):
    """Adds a number to the gradient of one element, where one is due."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, element: Tensor, training: Training) -> Tensor:
        ctx.training = training
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        fault = ctx.training.due("number")
        return grad, grad.new_tensor(fault.error if fault else 0.0), None


class Training:
    """A net with dropout and batch norm over all ranks, and one step of it that fails on this rank as it is told to.

    Args:
        way: how it is distributed, of `WAYS`.
    """

    def __init__(self, way: str, method: str, base: str = "sgd"):
        self.way, self.method, self.net, self.rank = way, method, mixed_net(), dist.get_rank()
        self.noise = torch.Generator().manual_seed(self.rank)
        self.base, of_base = BASES[base]
        self.options = {"perturb_sync": "local" if way == "local" else "global", "generators": [self.noise], **of_base}
        self.wrap()
        self.fault: Fault | None = None
        self.calls = 0
        self.net[0].register_forward_hook(self.after_first_layer)
        self.net[1].register_forward_hook(lambda norm, _, output: Spoilt.apply(output, norm.bias[3], self))
        signal.signal(signal.SIGINT, signal.default_int_handler)  # of a process in the background it would be ignored
        self.x, self.y = shard_of(self.rank, *batch(16))
        torch.manual_seed(100 + self.rank)
        random.seed(self.rank)

    def wrap(self) -> None:
        self.model: nn.Module = sharded(self.net) if self.way == "fsdp" else DistributedDataParallel(self.net)
        self.optimizer = make(self.model.parameters(), self.base, self.method, model=self.model, **self.options)

    def groups(self) -> list[dist.ProcessGroup]:
        """The process groups that its passes communicate in."""
        if self.way == "fsdp":
            return [p.device_mesh.get_group() for p in self.model.parameters()]
        return [self.model.process_group]

    def wrap_anew(self) -> None:
        """Another DDP module and another optimizer, which goes on from the state of the first."""
        state = self.optimizer.state_dict()
        del self.optimizer, self.model
        gc.collect()  # with the old hooks: an exception's traceback may hold them in a circle
        self.wrap()
        self.optimizer.load_state_dict(state)

    def due(self, place: str) -> Fault | None:
        fault = self.fault
        return fault if fault and (fault.place, fault.number) == (place, self.calls - 1) else None

    def strike(self, place: str) -> None:
        if fault := self.due(place):
            raise_it(fault.error)

    def after_first_layer(self, module: nn.Module, x: Any, output: Tensor) -> Tensor:
        self.strike("hook")
        return Struck.apply(output, self)

    def closure(self) -> Tensor:
        self.calls += 1
        self.optimizer.zero_grad()
        self.strike("before")
        noise = torch.rand(self.x.shape, generator=self.noise) + random.random()
        loss = (self.model(self.x + 0.01 * noise) - self.y).square().mean()
        self.strike("forward")
        if self.due("collective"):
            hang_up()
        if self.method != "exact":
            loss.backward()
            self.strike("backward")
        return loss

    def step(self, fault: Fault | None = None) -> Tensor:
        self.calls, self.fault = 0, fault
        try:
            return self.optimizer.step(self.closure)
        finally:
            self.fault = None

    def now(self) -> dict:
        """Everything that a step may change on this rank, frozen."""
        return {
            "weights": self.weights(),
            "state": [{k: bits(local(t)) for k, t in entry.items()} for entry in self.optimizer.state.values()],
            "counters": freeze(self.optimizer.session.counters),
            "steps": self.optimizer.session.steps_taken,
            "buffers": freeze(dict(self.net.named_buffers())),
            "random": [torch.get_rng_state(), self.noise.get_state(), freeze(random.getstate())],
        }

    def save(self, folder: str) -> None:
        """A checkpoint: what all ranks share, and what is this rank's own."""
        dcp.save(self._shared(), checkpoint_id=Path(folder, "shared"))
        own = {"torch": torch.get_rng_state(), "noise": self.noise.get_state(), "python": random.getstate()}
        own["buffers"] = dict(self.net.named_buffers())
        torch.save(own, Path(folder, f"own-{self.rank}"))

    def load(self, folder: str) -> None:
        shared, own = self._shared(), torch.load(Path(folder, f"own-{self.rank}"), weights_only=False)
        dcp.load(shared, checkpoint_id=Path(folder, "shared"))
        set_model_state_dict(self.model, shared["model"])
        set_optimizer_state_dict(self.model, self.optimizer, shared["optimizer"])
        with torch.no_grad():
            for name, buffer in self.net.named_buffers():
                buffer.copy_(own["buffers"][name])
        torch.set_rng_state(own["torch"])
        self.noise.set_state(own["noise"])
        random.setstate(own["python"])

    def _shared(self) -> dict:
        optimizer = get_optimizer_state_dict(self.model, self.optimizer)
        return {"model": get_model_state_dict(self.model), "optimizer": optimizer}

    def weights(self) -> list[Tensor]:
        return [bits(local(p)) for p in self.model.parameters()]


def sharded(net: nn.Sequential) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (net[0], net[4]):
        fully_shard(layer, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def raise_it(error: Any) -> None:
    """Raise, or send the signal."""
    if error is KeyboardInterrupt:
        signal.raise_signal(signal.SIGINT)
    elif isinstance(error, signal.Signals):
        os.kill(os.getpid(), error)
    raise error("a fault")


def hang_up() -> None:
    """Close the connections to all other ranks, as the system does for a process that has died."""
    for fd in map(int, os.listdir("/proc/self/fd")):
        try:
            if stat.S_ISSOCK(os.fstat(fd).st_mode):
                with socket.socket(fileno=os.dup(fd)) as connection:
                    if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.getpeername():
                        connection.shutdown(socket.SHUT_RDWR)
        except OSError:  # the listing's own; one that only listens
            continue
