"""What an optimizer owns between steps: its plan, what it knows of the model, loss scaling, counters, the last record."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gam_fused import torch_private
from gam_fused.backends import check_backend
from gam_fused.backends.base_optimizers import fused_base
from gam_fused.backends.uploads import upload
from gam_fused.checks import are_constants
from gam_fused.constants import Control
from gam_fused.memory import flattening
from gam_fused.memory.parameters import check_groups, check_materialized, check_parameters
from gam_fused.memory.plan import Plan
from gam_fused.parallel import agreement, ddp, fsdp
from gam_fused.settings import Settings
from gam_fused.step.coefficients import tables
from gam_fused.step.group_entries import GroupEntries
from gam_fused.step.loss_scaling import LossScaling
from gam_fused.step.method import Method
from gam_fused.step.precision import Watch
from gam_fused.step.record import Record
from gam_fused.transaction.model_state import ModelState
from gam_fused.transaction.randomness import Generators

IN_UPDATE = "in the update"  # where a step may fail, when all ranks have agreed on the direction
_numbers = itertools.count()
_NO_SETTINGS = ("params", "param_names", "gam")  # entries of a param group that no coefficient depends on


@dataclass(frozen=True)
class _Uploaded:
    """What the coefficient tables on the devices stand for, where comparing tells of a change: no tensors, no lists.

    Attributes:
        values, types: of `Session._group_values`; True == 1.0, so that equal values do not suffice.
    """

    given: Settings
    checked: Settings
    values: list[Any]
    types: list[type]


class Session:
    """The state of one optimizer, apart from its hyperparameters (`Settings`) and the base optimizer's own state.

    Attributes:
        base: the base optimizer. fused: its fused update, or None.
        entries: GAM's entries in its param groups.
        modules: what the user gave as `model`. generators: of the user's own.
        plan: the memory of the parameters, from the first step on.
        model_state: buffers and frozen parameters, where there is a model.
        replicas: what the optimizer averages over ranks itself. fsdp_modules: those that `fully_shard` was applied to.
        steps_taken: how many, skipped ones included. last: what the last one left behind.
        failed: where the last step failed; "" if it did not.
        running: held while a step runs.
    """

    plan: Plan  # absent before the first step, and after what it was built from is gone

    def __init__(self, base: Optimizer, rho_key: str, rho: float, modules: Sequence[nn.Module], generators: Sequence[Any]):
        self.base, self.fused = base, fused_base(base)
        self.entries = GroupEntries(base, rho_key, rho)
        self.modules, self.generators = list(modules), tuple(generators)
        self.loss_scaling = LossScaling()
        self.steps_taken = 0
        self._carried = (0.0, 0.0)  # skipped steps, and the counter of the stochastic rounding, to start a plan from
        self._begin()

    def _begin(self) -> None:
        """What a copy does not have."""
        self._number = next(_numbers)  # the same on all ranks, which make and copy their optimizers in the same order
        self.model_state: ModelState | None = None
        self.replicas: ddp.Replicas | None = None
        self.fsdp_modules: list[Any] = []
        self.last: Record | None = None
        self.failed = ""
        self._failures = 0  # so many are settled, by the ranks or by a checkpoint
        self.precision = Watch()
        self.running = threading.Lock()
        self._flat_buffers: list[Tensor] = []
        self._uploaded: _Uploaded | None = None
        self._made_for: tuple[Any, ...] = ()  # the settings that the plan was built for
        self._generators: tuple[tuple[Any, ...], Generators] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy. Copies of the user's generators would not be the ones that the closure draws from."""
        kept = ("base", "entries", "modules", "loss_scaling", "steps_taken")
        return {name: getattr(self, name) for name in kept} | {"generators": (), "_carried": self.counters}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.fused = fused_base(self.base)
        self._begin()
        self.entries.link()

    # The base optimizer's.

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.base.param_groups

    @property
    def state(self) -> Any:
        return self.base.state

    @property
    def fused_now(self) -> Any:
        """The fused update of the coming step: none where hooks of the base's own expect the direction in `p.grad`."""
        return None if torch_private.has_step_hooks(self.base) else self.fused

    # Before a step.

    @property
    def has_plan(self) -> bool:
        return "plan" in self.__dict__

    def check(self, settings: Settings, method: Method) -> ddp.Replicas | None:
        """Whether method and settings can work with these param groups.

        Returns:
            What the optimizer has to average over ranks itself.

        Raises:
            ValueError, TypeError: they cannot.
        """
        check_groups(self.param_groups, self.entries.rho_key)
        local = settings.perturb_sync == "local"
        return ddp.replicas(self.modules, self.param_groups, local=local, twice=method.twice)

    def prepare(self, settings: Settings, method: Method) -> Settings:
        """Bring the plan and the coefficient tables up to date with the param groups and `settings`.

        Returns:
            `settings`, checked.
        """
        made_for = (settings.backend, settings.flatten, settings.perturb_sync, method.twice)
        if not self.has_plan or made_for != self._made_for or not self.plan.is_current(self.param_groups):
            self._rebuild(settings, method)
            self._made_for = made_for
        uploaded, values = self._uploaded, self._group_values()
        # Types first: a tensor among the values would have to be asked for its own.
        same = uploaded and settings.same_as(uploaded.given) and list(map(type, values)) == uploaded.types
        if uploaded and same and values == uploaded.values:
            return uploaded.checked
        self._uploaded = None
        self.entries.complete()
        checked, numbers = self.tables(settings, method)
        self.plan.upload(numbers, checked.xi, checked.max_grad_norm or 0.0)
        self.plan.state_keys = [self.fused.state_keys(group) for group in self.param_groups] if self.fused else []
        values = self._group_values()
        if are_constants(values):
            self._uploaded = _Uploaded(settings, checked, values, list(map(type, values)))
        return checked

    def check_not_alone(self) -> None:
        """After a step that failed: whether the other ranks failed too, so that this one may step.

        With ``perturb_sync="local"`` they wait, unless they have averaged the direction and go on.

        Raises:
            RuntimeError: it failed on this rank alone.
        """
        waited_for = self.replicas is not None and self.replicas.local and self.failed != IN_UPDATE
        ranks = agreement.ranks_beside(self.modules, self.param_groups)
        if len(ranks) > 1 and not waited_for:
            agreement.check_all_failed(ranks, f"{self._number}/{self.steps_taken}/{self._failures}", self.failed)
            self.forget_failure()
        self.failed = ""

    def forget_failure(self) -> None:
        """On all ranks: what they have told of this failure must not be taken for the next one, at the same step."""
        self.failed = ""
        self._failures += 1

    def tables(self, settings: Settings, method: Method) -> tuple[Settings, dict[str, Any]]:
        """`settings` and the coefficient tables, each number in them checked.

        Raises:
            ValueError, TypeError: one that cannot work; names it.
        """
        check_groups(self.param_groups, self.entries.rho_key)
        checked = settings.checked(method.takes)
        return checked, tables(method, checked, self.param_groups, self.entries.rho_key, self.fused)

    def _group_values(self) -> list[Any]:
        """Names and values of the groups' entries."""
        values: list[Any] = []
        for group in self.base.param_groups:
            for name, value in group.items():
                if name not in _NO_SETTINGS:
                    values += (name, value)
        return values

    def _rebuild(self, settings: Settings, method: Method) -> None:
        settings.checked(method.takes)
        check_backend(settings.backend)
        self.drop_unstarted()
        self.entries.complete()
        check_materialized(self.param_groups)
        check_parameters(self.param_groups)
        self.flatten(settings)
        plan = Plan(self.param_groups, settings.backend)
        if not plan.params:
            raise RuntimeError("no parameter has requires_grad=True; nothing to optimize")
        self._start_controls(plan)
        replicas = self.check(settings, method)
        if replicas and self.replicas:
            replicas.go_on_from(self.replicas)
        self.replicas = replicas
        self.fsdp_modules = fsdp.fsdp_modules(self.modules)
        self.model_state = None
        if self.modules:
            self.model_state = ModelState(self.modules, plan.params, settings.backend, plan.frozen)
        self.plan, self._uploaded, self._generators = plan, None, None

    def _start_controls(self, plan: Plan) -> None:
        """Control blocks of a new plan: counters go on, and every block and shard rounds by noise of its own."""
        control = torch.zeros(len(Control), dtype=torch.float64, device="cpu")
        control[Control.LOSS_SCALE] = 1.0
        if self.has_plan:
            control.copy_(self.plan.blocks[0].control)
        else:
            control[Control.SKIPPED], control[Control.NOISE_STEP] = self._carried
        for number, block in enumerate(plan.blocks):
            control[Control.NOISE_SEED] = number + len(plan.blocks) * block.shard_index
            block.control.copy_(upload(control.clone(), block.control.device))

    def flatten(self, settings: Settings) -> None:
        """Where the settings say so, parameters become views of one buffer per device and dtype; see `flattening`."""
        if settings.flatten:
            self._flat_buffers = flattening.flatten(self.param_groups, self.modules, self._flat_buffers)

    def generators_of(self, devices: set[torch.device]) -> Generators:
        """The generators that passes may draw from: of the plan's devices, of the model's (`devices`), and the user's."""
        key = (frozenset(devices), tuple(map(id, self.generators)))
        if self._generators is None or self._generators[0] != key:
            self._generators = key, Generators({*self.plan.devices, *devices}, self.generators)
        return self._generators[1]

    def no_sync(self) -> AbstractContextManager[None]:
        """For the time of a step: DDP leaves to the optimizer what that averages itself."""
        return self.replicas.no_sync() if self.replicas else nullcontext()

    # After a step.

    @property
    def skipped(self) -> Tensor:
        """0-d: whether the last update was skipped because a gradient was not finite."""
        return self.plan.skipped

    @property
    def skipped_steps(self) -> int:
        """How many, since the beginning. Waits for the device."""
        return int(self.plan.blocks[0].control[Control.SKIPPED]) if self.has_plan else int(self._carried[0])

    @property
    def counters(self) -> tuple[float, float]:
        """Skipped steps, and the counter of the stochastic rounding. Waits for the device."""
        if not self.has_plan:
            return self._carried
        control = self.plan.blocks[0].control.tolist()
        return control[Control.SKIPPED], control[Control.NOISE_STEP]

    def forget_plan(self) -> None:
        """Drop everything built from param groups and state that are not the optimizer's any more; counters stay."""
        self._carried = self.counters
        self.__dict__.pop("plan", None)

    def restart(self, steps_taken: int, counters: tuple[float, float]) -> Callable[[], None]:
        """Count on from what a checkpoint says, with a plan that is built anew. Returns what undoes that."""
        before = self.steps_taken, self._carried, self.__dict__.get("plan")
        self.steps_taken, self._carried = steps_taken, counters
        self.__dict__.pop("plan", None)

        def undo() -> None:
            self.steps_taken, self._carried, plan = before
            if plan is not None:
                self.plan = plan

        return undo

    def drop_unstarted(self) -> None:
        """Remove state that a skipped first step created: its parameter has not been updated yet, so torch would have none.

        Waits for the device, if there may be such.
        """
        if self.has_plan:
            for block in self.plan.blocks:
                block.state.drop_unstarted(self.state)
