"""The passes of one step: what every one starts from, the closure, and the gradients it leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import repeat
from operator import is_not, or_
from typing import Any

import torch
from torch import Tensor

from gam_fused import torch_private
from gam_fused.backends.tensor_lists import TensorList
from gam_fused.checks import describe
from gam_fused.memory import gradients
from gam_fused.memory.differentiated import check_differentiated
from gam_fused.parallel import ddp, dtensor
from gam_fused.settings import Settings
from gam_fused.step import averaging, closures
from gam_fused.step.direction import Lists
from gam_fused.step.record import Record
from gam_fused.step.session import Session
from gam_fused.step.surroundings import Surroundings
from gam_fused.transaction.interrupts import Interrupts
from gam_fused.transaction.randomness import RandomState

_UNREACHED = (
    "the loss depends on no optimized parameter (one that is the optimizer's and has requires_grad=True); check that the "
    "closure uses this model"
)
_UNREDUCED = (
    "after backward no parameter has a gradient: FSDP has not reduced them over the ranks. The last backward of a pass "
    "needs set_requires_gradient_sync(True)"
)
_TAKEN = (
    "after backward no parameter has a gradient: the loss depends on none, or hooks of register_post_accumulate_grad_hook "
    "take them, as optimizers do that step inside backward. Each pass needs its gradients: remove these hooks"
)


class Passes:
    """The gradient passes of one `step(closure)`: the same model state, mini-batch and random numbers for each.

    Lists have one `TensorList` per block.

    Attributes:
        loss: what the closure returned in pass 1, detached.
        seen: of each block, which parameters have had a gradient in any pass.
        record: what the step leaves behind. at: where the step is, for other ranks.
    """

    def __init__(
        self,
        session: Session,
        settings: Settings,
        record: Record,
        closure: Callable[[], Any],
        interrupts: Interrupts,
        random: RandomState | None = None,
    ):
        self.session, self.settings, self.record = session, settings, record
        self.closure, self.interrupts = closure, interrupts
        self.plan = session.plan
        self.blocks = self.plan.blocks
        self.fused = session.fused_now
        self.loss: Any = None
        self.at = ""
        self.seen = [[False] * len(b.params) for b in self.blocks]
        self._reshard()
        self._surroundings = Surroundings(session, closure, settings.preserve_rng_state, random)
        if session.replicas and session.model_state:
            session.replicas.check_others(session.model_state.others)

    def gradient(self, point: str, *, keep: bool = False, part: bool = False) -> Lists:
        """One pass: the closure at the current weights, called `point`. Returns the gradients, taken from `p.grad`.

        `keep`: they will be needed after the next pass, or accumulated into. `part`: on a part of the mini-batch.
        """
        self._run(point, self._backward, part)
        groups = self.session.param_groups
        keep = keep or not self.fused  # a foreign base gets d in the buffers of the last gradient
        lists = []
        for b in self.blocks:
            if b.sharded:
                lists.append(dtensor.take(b.params, b.strides, b.dtype, groups, keep=keep))
            else:
                lists.append(gradients.take(b.params, b.strides, groups, keep=keep))
        return self._received(lists)

    def gradient_on_part(self, point: str, *, keep: bool = False, instead_of: Lists | None = None) -> Lists:
        """`gradient` for the flatness term: on a part of the mini-batch where the settings say so.

        `instead_of`: the gradient of the whole batch at that point, which serves where there is no part.
        """
        part = self.settings.on_part
        if instead_of is not None and not part:
            return instead_of
        return self.gradient(f"{point} on part" if point in self.record.losses else point, keep=keep, part=part)

    def differentiable_gradient(self, point: str, *, part: bool = False) -> tuple[list[Tensor | None], Lists]:
        """One pass that keeps its graph: the gradients as autograd made them (to be differentiated again), and as lists."""
        raw: list[Tensor | None] = []
        with ddp.no_unseen_ddp(self.session.replicas):
            self._run(point, lambda result: raw.extend(self._differentiate(result)), part)
        return raw, self._received(self.as_lists(raw))

    def as_lists(self, tensors: Sequence[Tensor | None]) -> Lists:
        """Tensors in the order of the plan's parameters, detached, as one list per block."""
        lists, start = [], 0
        for b in self.blocks:
            mine: list[Tensor | None] = []
            for i, (t, p) in enumerate(zip(tensors[start : start + len(b.params)], b.params, strict=True)):
                if t is not None:
                    gradients.check_size(t, p, b.strides.sizes[i], b.device, self.session.param_groups)
                    t = gradients.fit(t.detach(), b.strides[i], b.dtype)
                mine.append(t)
            lists.append(TensorList(mine))
            start += len(b.params)
        return lists

    def averaged(self, lists: Lists) -> Lists:
        """`lists` averaged over the ranks, where DDP has not done so and each pass shall be global."""
        replicas = self.session.replicas
        return averaging.average(replicas, self.blocks, lists) if replicas and not replicas.local else lists

    def _run(self, point: str, differentiate: Callable[[Any], None], part: bool) -> None:
        """One pass: the closure, then `differentiate` of what it returned."""
        self._forget_weights()
        first = not self.record.losses
        self.at = f"in pass {1 + len(self.record.losses)}"
        if first:
            self._clear_gradients()  # what was left there is not of this step; later passes find it taken
        else:
            self._surroundings.replay()
        if self.session.replicas:
            self.session.replicas.align_buffers()
        with torch.enable_grad(), self._surroundings.first_pass() if first else nullcontext():
            result = self.session.loss_scaling.run(self.interrupts.let_through, self._call, differentiate, part)
        self._surroundings.pass_done()
        kept = closures.kept(result if first else closures.loss_in(result))
        self.record.losses[point] = closures.number_in(kept)
        if first:
            self.loss = kept
            self._first_pass_done(result)

    def _call(self, differentiate: Callable[[Any], None], part: bool) -> Any:
        closure: Any = self.closure
        result = closure.on_part(self.settings.flatness_fraction) if part else closure()
        differentiate(result)
        return result

    def _first_pass_done(self, result: Any) -> None:
        if any(b.sharded for b in self.blocks):
            self.plan.check_sharded(self.session.param_groups)
        self.session.loss_scaling.publish(self.blocks)
        self.session.precision.see(closures.loss_in(result))
        self._surroundings.first_pass_done()

    def _forget_weights(self) -> None:
        """What others have made of the weights, and keep, does not see what we write: casts and the like, whole weights."""
        torch_private.forget_functions_of_weights()
        self._reshard()

    def _reshard(self) -> None:
        """Whole weights that FSDP was told to keep (`set_reshard_after_backward(False)`)."""
        for module in self.session.fsdp_modules:
            module.reshard()

    def _backward(self, result: Any) -> None:
        """Gradients into `p.grad`, where the closure has not done so."""
        if any(p.grad is not None for p in self.plan.params):
            self.session.loss_scaling.check_scaled()
            return
        self.session.loss_scaling.scale(closures.differentiable_in(result)).backward()
        if all(p.grad is None for p in self.plan.params):
            self._unreached()

    def _unreached(self) -> None:
        self.plan.check_sharded(self.session.param_groups)
        self.plan.check_in_place(self.session.param_groups)  # of parameters that are not the model's any more
        if any(map(torch_private.leaves_sums_of_fsdp, self.session.fsdp_modules)):
            raise RuntimeError(_UNREDUCED)
        hooked = any(map(torch_private.has_hooks_after_backward, self.plan.params))
        raise RuntimeError(_TAKEN if hooked else _UNREACHED)

    def _differentiate(self, result: Any) -> list[Tensor | None]:
        """Gradients as autograd makes them, with the graph to differentiate them again."""
        if any(p.grad is not None for p in self.plan.params):
            raise RuntimeError(
                "the closure called backward(), which leaves no graph to differentiate again: with method='exact' it must "
                "only return the loss. Methods 'finite_difference' and 'accelerated' accept both kinds of closures"
            )
        for p in filter(torch_private.has_hooks_after_backward, self.plan.params):
            raise RuntimeError(
                "method='exact' computes gradients without accumulating them, so that hooks of "
                f"register_post_accumulate_grad_hook do not run, and {describe(p, self.session.param_groups)} has one. "
                "Remove it, use register_hook, or another method"
            )
        scaled = self.session.loss_scaling.scale(closures.differentiable_in(result))
        raw: list[Tensor | None] = list(torch.autograd.grad(scaled, self.plan.params, create_graph=True, allow_unused=True))
        check_differentiated(scaled, raw, again=True)
        if all(g is None for g in raw):
            self._unreached()
        return raw

    def _received(self, lists: Lists) -> Lists:
        """The gradients of a pass as the method sees them; notes which parameters have one."""
        lists = self.averaged(lists)
        for seen, lst in zip(self.seen, lists, strict=True):
            if lst.complete:
                seen[:] = [True] * len(seen)
            elif not all(seen):
                seen[:] = map(or_, seen, map(is_not, lst.tensors, repeat(None)))
        return lists

    # How they end.

    def finish(self) -> None:
        """Hand over generators and buffers as pass 1 left them."""
        self.settle()
        self._forget_weights()
        del self.closure, self._surroundings  # a graph keeps the step, which shall keep neither copies nor the batch

    def settle(self) -> None:
        """Generators and buffers as pass 1 left them, before a base optimizer of the user's runs."""
        self._surroundings.settle(self.session.skipped)

    def abort(self) -> None:
        """After a failure: weights, buffers and generators as before the step, and no gradients left behind."""
        with torch.no_grad():
            self.plan.put_in_place()
            for b in self.blocks:
                b.put_back()
            self._surroundings.abort()
        try:
            for module in self.session.fsdp_modules:
                torch_private.drop_pass_of_fsdp(module)
        finally:
            self._clear_gradients()
            self._forget_weights()

    def _clear_gradients(self) -> None:
        gradients.clear(self.plan.params)
        gradients.clear(self.plan.frozen)
