"""One CUDA graph for a whole step: every forward and backward pass of the method, the ascents and the update.

    step = capture_step(optimizer, lambda x, y: loss_fn(model(x), y), (x, y))
    for x, y in loader:
        loss = step(x, y)
        scheduler.step()

What changes between steps is kept on the device: inputs are copied into the graph's own tensors, and the coefficient tables
are updated before a replay, so that schedules of lr, rho, rho_prime, alpha, ... work as in eager steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gam_fused.checks import describe, one_of, whole
from gam_fused.graphs.preserve import Preserved
from gam_fused.graphs.recording import Recording, record
from gam_fused.methods import METHODS, plain
from gam_fused.optimizer import FusedGAM
from gam_fused.parallel.dtensor import is_dtensor
from gam_fused.settings import SCHEDULED, Settings
from gam_fused.step import run
from gam_fused.step.closures import BatchClosure
from gam_fused.step.session import Session
from gam_fused.step.step import Step
from gam_fused.torch_private import has_step_hooks, note_step_of_base
from gam_fused.transaction.interrupts import Interrupts
from gam_fused.transaction.randomness import Generators

Passes = Callable[[Step], None]  # what runs one kind of step


def capture_step(
    optimizer: FusedGAM,
    loss_fn: Callable[..., Tensor],
    example_inputs: Sequence[Tensor],
    *,
    warmup: int = 3,
    pool: Any = None,
) -> CapturedStep:
    """Capture `optimizer.step(lambda inputs: loss_fn(*inputs), inputs)` as one CUDA graph; with an `interval`, as two.

    Args:
        optimizer: a `FusedGAM` with a fused base (torch's SGD, Adam or AdamW), parameters on one CUDA device.
        loss_fn: computes the 0-d loss of one mini-batch, as a closure of `step` does: on the device alone, without
            synchronizing with the host, and in the same way every time.
        example_inputs: tensors with the shapes and dtypes of all later inputs. They are copied to the device, so they
            may be on the CPU (in pinned memory, for asynchronous copies).
        warmup: eager steps before the capture, at least 2, in which libraries choose algorithms and allocate memory. They
            are undone: weights, buffers of `model`, optimizer state and generators are as before.
        pool: a memory pool to share, as for `torch.cuda.graph`.

    Returns:
        A callable that takes the inputs and returns the loss of the unperturbed pass.

    Raises:
        TypeError, ValueError: what cannot be in a graph, named: a base optimizer that is not fused (it needs the host),
            ``method="exact"``, a `grad_scaler` (use bf16), ``backend="reference"``, ``perturb_sync="local"``, sharded
            parameters, parameters on the CPU or on several devices.
        RuntimeError: no CUDA device.
    """
    return CapturedStep(optimizer, loss_fn, example_inputs, warmup, pool)


class CapturedStep:
    """What `capture_step` returns. Hooks, `diagnostics` and `skipped_steps` of the optimizer work as with eager steps.

    If param groups, optimizer state (`load_state_dict`), or a setting that changes the passes (`method`, `adaptive`, ...)
    have been replaced since the capture, the next call captures again. The same module in train and in eval mode needs two
    captured steps. Numbers that `loss_fn` draws on the CPU, or computes in Python, are those of the capture in every replay.
    """

    def __init__(
        self,
        optimizer: FusedGAM,
        loss_fn: Callable[..., Tensor],
        example_inputs: Sequence[Tensor],
        warmup: int,
        pool: Any,
    ):
        self.optimizer, self.loss_fn, self.pool = optimizer, loss_fn, pool
        self.warmup = whole("warmup", warmup, minimum=2)  # the second step lists the state that the first has made
        _check_inputs(example_inputs)
        self.device = _check_optimizer(optimizer)
        self.inputs = [t.detach().to(self.device, copy=True) for t in example_inputs]
        self._capture()

    def __call__(self, *inputs: Tensor) -> Tensor:
        """One step. Returns the loss of pass 1, as a tensor that later steps do not overwrite.

        Raises:
            TypeError, ValueError: inputs that differ from the examples in number, shape or dtype.
        """
        _check_inputs(inputs)
        _check_same_kind(inputs, self.inputs)
        return _replay(self.optimizer, self, inputs)

    def _capture(self) -> None:
        """A graph of the step of the method, and with an `interval` one of the plain step between such."""
        optimizer = self.optimizer
        self._graphs: dict[Passes, Recording] = {}  # gives the memory of those before back
        with torch.no_grad(), torch.cuda.device(self.device):
            settings = optimizer.prepare()
            session, method = optimizer.session, METHODS[settings.method]
            check_others(session)
            kinds = [method.passes, plain.passes] if settings.interval > 1 else [method.passes]
            preserved = Preserved(session, settings)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            try:
                with torch.cuda.stream(stream):
                    for passes in kinds:
                        for _ in range(self.warmup):
                            random = Generators({self.device}).begin() if settings.preserve_rng_state else None
                            self._run(passes, settings, random)
            finally:
                torch.cuda.current_stream().wait_stream(stream)
                preserved.put_back()
            graphs: dict[Passes, Recording] = {}
            pool = self.pool
            for passes in kinds:
                try:
                    graphs[passes] = record(partial(self._run, passes, settings), settings, self.device, stream, pool)
                finally:
                    preserved.put_back()  # nothing ran on the device, but the host's generator did
                pool = pool or graphs[passes].graph.pool()
        self._graphs, self._plan, self._made_for = graphs, session.plan, self._decides(settings)

    def _run(self, passes: Passes, settings: Settings, random: Any) -> Step:
        """The passes of one step, without what `FusedGAM.step` keeps on the host."""
        method, session = METHODS[settings.method], self.optimizer.session
        closure = BatchClosure(lambda inputs: self.loss_fn(*inputs), tuple(self.inputs))
        with Interrupts() as interrupts:
            return run.take(session, settings, method, passes, closure, interrupts, random)

    def _decides(self, settings: Settings) -> tuple[Any, ...]:
        """What the graphs are made for, apart from memory: all settings but the numbers that are read from the device."""
        numbers: dict[str, Any] = dict.fromkeys((*SCHEDULED, "rho", "xi", "sam_rho"))
        switches: dict[str, Any] = {
            name: 1.0 if getattr(settings, name) is not None else None for name in ("max_grad_norm", "max_ratio")
        }
        fixed = replace(settings, **numbers, **switches, interval=min(settings.interval, 2))
        return fixed, settings.oracle_is_off_the_probe, self.optimizer.base_optimizer, list(self.optimizer.session.modules)

    def is_current(self, settings: Settings) -> bool:
        """Whether the graphs still are of this optimizer's memory and settings; `optimizer.prepare` has run."""
        session = self.optimizer.session
        return (
            bool(self._graphs)  # there are none after a capture that failed
            and self._plan is session.plan
            and self._made_for == self._decides(settings)
            and all(b.state.is_current(self._plan.state_keys, session.state) for b in self._plan.blocks)
        )

    @torch.no_grad()
    def replay(self, inputs: Sequence[Tensor]) -> Tensor:
        """One step. Returns the loss of pass 1."""
        _check_optimizer(self.optimizer)
        session = self.optimizer.session
        with torch.cuda.device(self.device):
            settings = self.optimizer.prepare()
            if not self.is_current(settings):
                self._capture()
            for static, t in zip(self.inputs, inputs, strict=True):
                static.copy_(t, non_blocking=True)
            between = session.steps_taken % settings.interval
            recorded = self._graphs[plain.passes if between else METHODS[settings.method].passes]
            recorded.replay()
            note_step_of_base(self.optimizer)
            run.count(session, replace(recorded.step.record, settings=settings, rhos=run.radii(session)))
            loss: Tensor = recorded.step.loss.clone()
            return loss


@Optimizer.profile_hook_step  # calls the hooks of `step`
def _replay(optimizer: FusedGAM, captured: CapturedStep, inputs: Sequence[Tensor]) -> Tensor:
    return captured.replay(inputs)


def check_others(session: Session) -> None:
    """Raises ValueError for trainable parameters of the model that are not the optimizer's.

    Their gradients would be the graph's own memory, which `zero_grad` gives away and no replay sets again.
    """
    others = {id(p) for p in session.model_state.others_now() if p.requires_grad} if session.model_state else set()
    for name, p in chain.from_iterable(module.named_parameters() for module in session.modules):
        if id(p) in others:
            raise ValueError(
                f"capture_step cannot keep gradients for another optimizer: {name} (shape {tuple(p.shape)}) of model= is "
                "not among this optimizer's parameters. Freeze it by requires_grad_(False), or use step() without a graph"
            )


def _check_optimizer(optimizer: FusedGAM) -> torch.device:
    if not isinstance(optimizer, FusedGAM):
        raise TypeError(f"capture_step captures steps of a FusedGAM, not of a {type(optimizer).__name__}")
    one_of("method", optimizer.method, tuple(METHODS))
    if optimizer.session.fused is None:
        name = type(optimizer.base_optimizer).__name__
        raise ValueError(f"base optimizer {name} is not fused, so every step needs the host; use torch's SGD, Adam or AdamW")
    refused = {
        "step hooks of the base optimizer": has_step_hooks(optimizer.base_optimizer),
        "generators=": bool(optimizer.generators),
        f"method={optimizer.method!r}": METHODS[optimizer.method].twice,
        "a grad_scaler": optimizer.grad_scaler is not None,
        "backend='reference'": optimizer.backend == "reference",
        "perturb_sync='local'": optimizer.perturb_sync == "local",
        "sharded parameters (DTensor)": any(is_dtensor(p) for group in optimizer.param_groups for p in group["params"]),
    }
    for name, is_set in refused.items():
        if is_set:
            raise ValueError(f"{name} cannot be used with capture_step; use optimizer.step(closure)")
    if not torch.cuda.is_available():
        raise RuntimeError("capture_step needs a CUDA device, and torch sees none here; use optimizer.step(closure)")
    params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    for p in params:
        if p.device.type != "cuda" or p.device != params[0].device:
            where = describe(p, optimizer.param_groups)
            raise ValueError(f"{where} is not on the graph's CUDA device; all parameters must be on one")
    device: torch.device = params[0].device
    return device


def _check_inputs(inputs: Sequence[Tensor]) -> None:
    if isinstance(inputs, Tensor) or not all(isinstance(t, Tensor) for t in inputs):
        kinds = type(inputs).__name__ if isinstance(inputs, Tensor) else [type(t).__name__ for t in inputs]
        raise TypeError(f"inputs of a captured step must be a sequence of tensors, but are {kinds}")


def _check_same_kind(inputs: Sequence[Tensor], examples: Sequence[Tensor]) -> None:
    if len(inputs) != len(examples):
        raise TypeError(f"the step was captured with {len(examples)} inputs, but is called with {len(inputs)}")
    for i, (t, example) in enumerate(zip(inputs, examples, strict=True)):
        if t.shape != example.shape or t.dtype != example.dtype:
            raise ValueError(
                f"input {i} has shape {tuple(t.shape)}, {t.dtype}, but the step was captured with {tuple(example.shape)}, "
                f"{example.dtype}; drop the last, smaller batch, or capture a second step for it"
            )
