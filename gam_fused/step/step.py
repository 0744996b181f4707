"""One step of the engine: gradient passes inside a transaction, ascents between them, one update at the end.

`methods` says which passes a method makes; this file says what a pass, an ascent and an update are, on every block.
It holds no formula (these are the backends') and no coefficient (these are `coefficients`').
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import repeat
from operator import is_, is_not, or_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gam_fused.backends.operands import Combine, CombinedUpdate, DirectionProducts, Perturb, Restore, SquaredNorm
from gam_fused.backends.tensor_lists import EMPTY, TensorList
from gam_fused.base import hooks
from gam_fused.constants import GUARD, Control
from gam_fused.memory import gradients
from gam_fused.parallel import ddp, dtensor
from gam_fused.step import closures
from gam_fused.transaction.interrupts import Interrupts
from gam_fused.transaction.randomness import RandomState

if TYPE_CHECKING:
    from gam_fused.optimizer import FusedGAM

Lists = list[TensorList]
_UNREACHED = "the closure's loss depends on none of the parameters that require a gradient: is the right model in it?"


class Step:
    """The state of one `FusedGAM.step(closure)`. Lists below have one `TensorList` per block.

    Attributes:
        fused: the base optimizer's fused update, or None where `base.step()` makes it.
        loss: what the closure returned in pass 1, detached.
        losses: the loss of every pass, by the point it was made at. ascents: which reductions this step made. extras: norms
            that a method computed itself. All for `diagnostics`.
    """

    def __init__(
        self, optimizer: FusedGAM, closure: Callable[[], Any], interrupts: Interrupts, random: RandomState | None = None
    ):
        self.optimizer, self.closure, self.interrupts = optimizer, closure, interrupts
        self.plan = optimizer._plan
        self.blocks = self.plan.blocks
        self.loss: Any = None
        self.losses: dict[str, Any] = {}
        self.extras: dict[str, Tensor] = {}
        self.ascents: list[int] = []
        # Hooks of the base's own expect to find the direction in `p.grad`.
        self.fused = None if hooks.has_step_hooks(optimizer.base_optimizer) else optimizer._fused
        self._seen = [[False] * len(b.params) for b in self.blocks]
        self._reshard()
        self._model = self.plan.model_state.begin() if self.plan.model_state else None
        if random is None and optimizer.preserve_rng_state:
            random = self.plan.generators_of(self._model.devices if self._model else set(), optimizer.generators).begin()
        self._random = random
        self._settled = False  # whether generators and buffers stand where they shall be after the step
        for block in self.blocks:
            block.backed_up = False

    # Passes.

    def gradient(self, point: str, *, keep: bool = False) -> Lists:
        """One pass: the closure at the current weights, called `point`. Returns the gradients, taken from `p.grad`.

        `keep`: they will be needed after the next pass, or accumulated into.
        """
        self._run(point, self._backward)
        groups = self.optimizer.param_groups
        keep = keep or not self.fused  # a foreign base gets d in the buffers of the last gradient
        return self._received(
            [
                (dtensor if b.sharded else gradients).take(b.params, b.strides, b.dtype, groups, keep=keep)
                for b in self.blocks
            ]
        )

    def differentiable_gradient(self, point: str) -> tuple[list[Tensor | None], Lists]:
        """One pass that keeps its graph: the gradients as autograd made them (to be differentiated again), and as lists."""
        raw: list[Tensor | None] = []
        with ddp.no_unseen_ddp(self.plan.replicas):
            self._run(point, lambda result: raw.extend(self._differentiate(result)))
        return raw, self._received(self.as_lists(raw))

    def as_lists(self, tensors: Sequence[Tensor | None]) -> Lists:
        """Tensors in the order of the plan's parameters, detached, as one list per block."""
        lists, start = [], 0
        for b in self.blocks:
            rows = zip(tensors[start : start + len(b.params)], b.params, b.strides, strict=True)
            lists.append(TensorList([None if t is None else gradients.fit(t.detach(), p, s) for t, p, s in rows]))
            start += len(b.params)
        return lists

    def averaged(self, lists: Lists) -> Lists:
        """`lists` averaged over the ranks, where DDP has not done so and each pass shall be global."""
        replicas = self.plan.replicas
        return replicas.average(self.blocks, lists) if replicas and not replicas.local else lists

    def _run(self, point: str, differentiate: Callable[[Any], None]) -> None:
        """One pass: the closure, then `differentiate` of what it returned."""
        torch.clear_autocast_cache()  # an autocast context around step() would keep casts of the weights of the last pass
        self._reshard()
        first = not self.losses
        if first:
            self._clear_gradients()  # what was left there is not of this step; later passes find it taken
        else:
            for part in (self._random, self._model):
                if part:
                    part.replay()
        watched = self._model.first_pass() if first and self._model else nullcontext()
        with torch.enable_grad(), watched:
            result = self.optimizer._amp.run(lambda: self.interrupts.let_through(self.closure))
            self.interrupts.let_through(lambda: differentiate(result))
        self.losses[point] = closures.number_in(result)
        if first:
            self._first_pass_done(result)

    def _first_pass_done(self, result: Any) -> None:
        self.optimizer._amp.publish(self.optimizer, self.blocks)
        self.optimizer._precision_watch.see(closures.loss_in(result))
        self.loss = closures.detached(result)
        for part in (self._random, self._model):
            if part:
                part.first_pass_done()

    def _reshard(self) -> None:
        """Whole weights that FSDP was told to keep (`set_reshard_after_backward(False)`) would not see what we wrote."""
        for module in self.plan.fsdp_modules:
            module.reshard()

    def _backward(self, result: Any) -> None:
        """Gradients into `p.grad`, where the closure has not done so."""
        if any(p.grad is not None for p in self.plan.params):
            self.optimizer._amp.check_scaled()
            return
        self.optimizer._amp.scale(closures.differentiable_in(result)).backward()
        if all(p.grad is None for p in self.plan.params):
            self._unreached()

    def _unreached(self) -> None:
        self.plan.check_in_place(self.optimizer.param_groups)  # of parameters that are not the model's any more
        raise RuntimeError(_UNREACHED)

    def _differentiate(self, result: Any) -> list[Tensor | None]:
        """Gradients as autograd makes them, with the graph to differentiate them again."""
        if any(p.grad is not None for p in self.plan.params):
            raise RuntimeError(
                "the closure called backward(), which leaves nothing to differentiate again: with method='exact' it must "
                "only return the loss. Methods 'finite_difference' and 'accelerated' take closures of both kinds"
            )
        scaled = self.optimizer._amp.scale(closures.differentiable_in(result))
        raw = list(torch.autograd.grad(scaled, self.plan.params, create_graph=True, allow_unused=True))
        if all(g is None for g in raw):
            self._unreached()
        return raw

    def _received(self, lists: Lists) -> Lists:
        """The gradients of a pass as the method sees them; notes which parameters have one."""
        lists = self.averaged(lists)
        for seen, lst in zip(self._seen, lists, strict=True):
            if not any(seen):
                seen[:] = map(is_not, lst.tensors, repeat(None))
            elif not all(seen):
                seen[:] = map(or_, seen, map(is_not, lst.tensors, repeat(None)))
        return lists

    # Ascents.

    def ascend(
        self, ascent: int, x: Lists, *, minus: Lists | None = None, fold: Lists | None = None, oracle: bool = False
    ) -> Lists | None:
        """theta <- base + radius * (x - minus) / |x - minus|.

        `ascent` 0 and 1 start from the weights before the step, 2 from where the last one led. The first to run also backs
        theta up. With `fold`, that list becomes FOLD_0 * fold + FOLD_2 * x, and is returned as what `update` takes as `acc`.
        """
        self._reduce_norm(ascent, x, minus)
        acc = self._foldable(fold, x) if fold else None
        with torch.no_grad():
            for i, b in enumerate(self.blocks):
                b.kernels.perturb_(
                    Perturb(
                        layout=b.layout,
                        theta=b.theta,
                        base=b.backup if b.backed_up and ascent < 2 else EMPTY,
                        x=x[i],
                        y=minus[i] if minus else EMPTY,
                        folded=acc[i] if acc else EMPTY,
                        backup=EMPTY if b.backed_up else b.backup,
                        coefficients=b.shared.tables["oracle" if oracle else "gam"],
                        partials=b.shared.part("partials", ascent, 2),
                        control=b.control,
                        realised=b.part("realised", ascent),
                        ascent=ascent,
                        adaptive=self.optimizer.adaptive,
                    )
                )
                b.backed_up = True
        if not oracle:
            self.ascents.append(ascent)
        return acc

    def _reduce_norm(self, slot: int, x: Lists, minus: Lists | None = None) -> None:
        for i, b in enumerate(self.blocks):
            weight = EMPTY
            if self.optimizer.adaptive and slot != GUARD:
                weight = b.backup if b.backed_up and slot < 2 else b.theta
            y = minus[i] if minus else EMPTY
            b.kernels.squared_norm(
                SquaredNorm(layout=b.layout, x=x[i], y=y, weight=weight, partials=b.part("partials", slot, 2))
            )
        self.plan.share(slot, 2)

    def accumulator(self, lists: Lists) -> Lists:
        """`lists` as what `update` takes as `acc`: in float32 where they are of lower precision."""
        return [b.accumulator(lst) for b, lst in zip(self.blocks, lists, strict=True)]

    def _foldable(self, fold: Lists, x: Lists) -> Lists:
        """`fold`, with zeros where a gradient was missing there but is not in `x`."""
        for lst, other in zip(fold, x, strict=True):
            for i, (mine, theirs) in enumerate(zip(lst.tensors, other.tensors, strict=True)):
                if mine is None and theirs is not None:
                    lst.replace(i, torch.zeros_like(theirs))
        return self.accumulator(fold)

    # The update.

    def update(
        self,
        *,
        x3: Lists,
        x1: Lists | None = None,
        acc: Lists | None = None,
        table: str = "gam",
        guard_direction: bool = False,
    ) -> None:
        """theta <- the base optimizer's update of the backup in the direction d of `x1`, `x3` and `acc`, unless skipped."""
        self.plan.check_in_place(self.optimizer.param_groups)  # once, after all passes: it takes a while
        if not self.ascents and not self.blocks[0].backed_up:
            for b in self.blocks:
                b.set(Control.FOUND_INF, 0.0)
        rows = 6 if x1 else 2
        if x1 or (acc and (guard_direction or self.optimizer.max_grad_norm)):
            self._reduce_direction(x1, x3, acc, table, rows)
        else:
            self._reduce_norm(GUARD, x3)
        if self.plan.replicas and self.plan.replicas.local:
            if x1:
                self.extras["products"] = self.blocks[0].shared.partials[GUARD].sum(1)
            x3 = self.plan.replicas.average_direction(self.blocks, x1, x3, acc, table, rows, self._seen)
            x1, acc, table, rows = None, None, "plain", 2
            self._reduce_norm(GUARD, x3)
        active = self._fill_in(x1, x3, acc)
        apply = self._apply_fused if self.fused else self._apply_foreign
        apply(x1, x3, acc, table, rows, active)

    def _reduce_direction(self, x1: Lists | None, x3: Lists, acc: Lists | None, table: str, rows: int) -> None:
        for i, b in enumerate(self.blocks):
            b.kernels.direction_products(
                DirectionProducts(
                    layout=b.layout,
                    g1=x1[i] if x1 else EMPTY,
                    last=x3[i],
                    folded=acc[i] if acc else EMPTY,
                    coefficients=b.shared.tables[table],
                    partials=b.part("partials", GUARD, rows),
                )
            )
        self.plan.share(GUARD, rows)

    def _fill_in(self, x1: Lists | None, x3: Lists, acc: Lists | None) -> list[list[bool]]:
        """Which parameters had a gradient in any pass. One that has none in the lists of the update gets a zero there."""
        for i, (b, seen) in enumerate(zip(self.blocks, self._seen, strict=True)):
            lists = [lst[i] for lst in (x1, x3, acc) if lst]
            if any(map(is_, x3[i].tensors, repeat(None))):
                for j in range(len(b.params)):
                    if seen[j] and all(lst.tensors[j] is None for lst in lists):
                        x3[i].replace(j, b.zeros(j))
        return self._seen

    def _apply_fused(
        self, x1: Lists | None, x3: Lists, acc: Lists | None, table: str, rows: int, active: list[list[bool]]
    ) -> None:
        optimizer = self.optimizer
        base: Any = self.fused
        for b, mask in zip(self.blocks, active, strict=True):
            b.state.ensure(base, self.plan.state_keys, optimizer.state, optimizer.param_groups, mask)
        with torch.no_grad():
            for i, b in enumerate(self.blocks):
                state1, state2, state3 = b.state.lists
                b.kernels.combined_update_(
                    CombinedUpdate(
                        layout=b.layout,
                        theta=b.theta,
                        backup=b.backup if b.backed_up else EMPTY,
                        g1=x1[i] if x1 else EMPTY,
                        last=x3[i],
                        folded=acc[i] if acc else EMPTY,
                        state1=state1,
                        state2=state2,
                        state3=state3,
                        steps=b.state.steps,
                        coefficients=b.shared.tables[table],
                        partials=b.shared.part("partials", GUARD, rows),
                        control=b.control,
                        direction=b.part("direction"),
                        algorithm=int(base.algorithm),
                    )
                )
                b.backed_up = False
        hooks.note_step_of_base(optimizer.base_optimizer)

    def _apply_foreign(
        self, x1: Lists | None, x3: Lists, acc: Lists | None, table: str, rows: int, active: list[list[bool]]
    ) -> None:
        """d into `p.grad`, then `base.step()`: a plain optimizer must be asked on the host whether to run at all."""
        for i, (b, mask) in enumerate(zip(self.blocks, active, strict=True)):
            for j in range(len(b.params)):
                if mask[j] and x3[i].tensors[j] is None:
                    x3[i].replace(j, b.zeros(j))
        with torch.no_grad():
            for i, b in enumerate(self.blocks):
                b.kernels.combine_(
                    Combine(
                        layout=b.layout,
                        out=x3[i],
                        g1=x1[i] if x1 else EMPTY,
                        last=x3[i],
                        folded=acc[i] if acc else EMPTY,
                        coefficients=b.shared.tables[table],
                        partials=b.shared.part("partials", GUARD, rows),
                        control=b.control,
                        direction=b.part("direction"),
                    )
                )
                if b.backed_up:
                    b.kernels.restore_(Restore(layout=b.layout, theta=b.theta, backup=b.backup))
        if self.skipped:
            return
        for b, lst in zip(self.blocks, x3, strict=True):
            b.state.drop_unstarted(self.optimizer.state)
            for p, d in zip(b.params, lst.tensors, strict=True):
                p.grad = dtensor.like(d, p) if b.sharded and d is not None else d
            b.backed_up = False  # the base optimizer's step is not undone
        self._settle()
        self._step_base()
        gradients.clear(self.plan.params)

    def _step_base(self) -> None:
        base = self.optimizer.base_optimizer
        try:
            with hooks.global_step_hooks_called():
                base.step()
        except BaseException as error:
            note = (
                f"FusedGAM: {type(base).__name__}.step failed after all passes had been made. Weights and optimizer state "
                "are as it left them: parameters that it had updated stay updated, in both"
            )
            if hasattr(error, "add_note"):
                error.add_note(note)
            else:  # Python 3.10
                warnings.warn(note, stacklevel=2)
            raise

    @property
    def skipped(self) -> Tensor:
        """0-d: whether the update was skipped because a gradient was not finite."""
        return self.blocks[0].control[Control.LAST_SKIPPED]

    # How it ends.

    def finish(self) -> None:
        """Hand over generators and buffers as pass 1 left them."""
        self._settle()
        self._reshard()
        self._model = self._random = None  # `diagnostics` keeps the step, which shall keep neither copies nor the batch
        del self.closure

    def _settle(self) -> None:
        if self._settled:
            return
        self._settled = True
        if self._random:
            self._random.finish()
        if self._model:
            self._model.finish(self.skipped)

    def abort(self) -> None:
        """After a failure: weights, buffers and generators as before the step, and no gradients left behind."""
        with torch.no_grad():
            self.plan.put_in_place()
            for b in self.blocks:
                if b.backed_up:
                    b.kernels.restore_(Restore(layout=b.layout, theta=b.theta, backup=b.backup))
                    b.backed_up = False
            if not self._settled:
                for part in (self._random, self._model):
                    if part:
                        part.abort()
        self._clear_gradients()
        self._reshard()

    def _clear_gradients(self) -> None:
        gradients.clear(self.plan.params)
        gradients.clear(self.plan.frozen)
