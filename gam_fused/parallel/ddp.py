"""Replicas under DistributedDataParallel: what the optimizer averages over ranks itself, where DDP does not.

With ``perturb_sync="global"`` DDP averages every pass, all ranks see the same gradients and take the same decisions, and
there is nothing to do, but for methods that differentiate twice: `torch.autograd.grad` does not run DDP's hooks, so their
gradients and Hessian-vector products are averaged by the optimizer. With ``perturb_sync="local"`` each rank makes all passes
by its own gradients (m-sharpness: Foret et al., ICLR 2021, section 3) and one all-reduce averages the combined direction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from operator import is_
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel

from gam_fused.backends.tensor_lists import TensorList, flat_views
from gam_fused.backends.uploads import upload
from gam_fused.checks import Groups, describe
from gam_fused.parallel.ddp_buffers import SharedBuffers
from gam_fused.parallel.dtensor import is_dtensor
from gam_fused.parallel.fsdp import refuse_fsdp1
from gam_fused.torch_private import is_joining


def replicas(modules: Sequence[nn.Module], groups: Groups, *, local: bool, twice: bool) -> Replicas | None:
    """What has to be averaged here, or None: DDP does it all, or there is no DDP to be seen.

    Args:
        local: whether ``perturb_sync="local"``. twice: whether the method differentiates gradients once more.

    Raises:
        ValueError: ``perturb_sync="local"`` without DistributedDataParallel in `modules`, or with parameters outside of it.
        TypeError: FSDP1, or a method or `perturb_sync` that sharded parameters cannot have.
    """
    refuse_fsdp1(modules, groups)
    if local or twice:
        _refuse_shards(groups, local)
    ddp = [m for root in modules for m in root.modules() if isinstance(m, DistributedDataParallel)]
    if local:
        _check_local(ddp, groups)
    return Replicas(ddp, local) if ddp and (local or twice) else None


def _refuse_shards(groups: Groups, local: bool) -> None:
    for group in groups:
        for p in group["params"]:
            if is_dtensor(p) and local:
                raise TypeError(
                    f"perturb_sync='local': {describe(p, groups)} is sharded. No rank has a gradient of its own for it: "
                    "backward reduces and scatters in one go. Use 'global'"
                )
            if is_dtensor(p):
                raise TypeError(
                    f"method='exact': {describe(p, groups)} is sharded, and gradients that a mesh reduces cannot be "
                    "differentiated again. Use 'finite_difference', the same algorithm without double backward"
                )


def _check_local(ddp: list[DistributedDataParallel], groups: Groups) -> None:
    if not ddp:
        raise ValueError(
            "perturb_sync='local' averages the combined direction itself and needs the DistributedDataParallel module: "
            "wrap the model first, then pass the wrapper as model=. Without DDP use perturb_sync='global'"
        )
    if any(m.process_group is not ddp[0].process_group for m in ddp):
        raise ValueError("perturb_sync='local': the DistributedDataParallel modules in model= have several process groups")
    averaged = {
        id(p) for m in ddp for name, p in m.module.named_parameters() if name not in m.parameters_to_ignore
    }  # fmt: skip
    for group in groups:
        for p in group["params"]:
            if id(p) not in averaged:
                raise ValueError(
                    f"perturb_sync='local': {describe(p, groups)} is not averaged by the DistributedDataParallel in model=; "
                    "give it an optimizer of its own"
                )


@contextmanager
def no_unseen_ddp(seen: Replicas | None) -> Iterator[None]:
    """For the time of a pass that DDP's hooks will not average: raise where a DDP runs that was not given as `model`.

    Raises:
        RuntimeError: from its forward. Unaveraged gradients would make the replicas diverge silently.
    """

    def refuse(module: nn.Module, _: Any) -> None:
        if isinstance(module, DistributedDataParallel) and not (seen and module in seen.ddp):
            if dist.get_world_size(module.process_group) == 1:
                return
            raise RuntimeError(
                "method='exact' under DistributedDataParallel averages gradients and Hessian-vector products itself, so it "
                "needs the wrapper: FusedGAM(..., model=ddp_model). Where the closure also uses another one that it does "
                "not train, as a GAN's discriminator, let it call that one's .module"
            )

    if not (dist.is_available() and dist.is_initialized()):
        yield
        return
    hook = register_module_forward_pre_hook(refuse)
    try:
        yield
    finally:
        hook.remove()


class Replicas:
    """DDP modules that leave the averaging to the optimizer.

    Attributes:
        ddp: the modules. group: their process group.
        local: whether the combined direction is averaged, once per step; otherwise every gradient is.
    """

    def __init__(self, ddp: list[DistributedDataParallel], local: bool):
        self.ddp, self.local = ddp, local
        self.group = ddp[0].process_group
        self._buffers = [SharedBuffers(module) for module in ddp]

    def go_on_from(self, other: Replicas) -> None:
        """Take over what has been received in a step that failed."""
        if len(self.ddp) == len(other.ddp) and all(map(is_, self.ddp, other.ddp)):
            self._buffers = other._buffers

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """For the time of a step DDP reduces and broadcasts nothing. Its next forward aligns buffers, as after any step.

        Raises:
            RuntimeError: inside `join()`, or from the first backward of a static graph: DDP cannot do without these there.
        """
        if any(map(is_joining, self.ddp)):
            raise RuntimeError(
                f"{self._mode} averages over the ranks by itself, which DistributedDataParallel.join() does not see: ranks "
                "that have run out of batches would not take part. Give all ranks equally many, or use "
                "perturb_sync='global' with a method other than 'exact'"
            )
        for buffers in self._buffers:
            buffers.begin()
        with ExitStack() as stack:
            for module in self.ddp:
                stack.enter_context(module.no_sync())
                module.require_forward_param_sync = False
                stack.callback(setattr, module, "require_forward_param_sync", True)
            try:
                yield
            except RuntimeError as error:
                if "expect_autograd_hooks_" not in str(error) or not any(m.static_graph for m in self.ddp):
                    raise
                raise RuntimeError(
                    f"{self._mode} makes no use of DDP's all-reduce, without which DistributedDataParallel cannot record a "
                    "static graph: wrap the model without static_graph=True, or use perturb_sync='global' with a method "
                    "other than 'exact'"
                ) from error
            finally:
                for buffers in self._buffers:
                    buffers.end()

    @property
    def _mode(self) -> str:
        return "perturb_sync='local'" if self.local else "method='exact'"

    def check_others(self, others: Sequence[Tensor]) -> None:
        """Raises ValueError for trainable parameters that are not the optimizer's: nobody averages their gradients."""
        trainable = {id(p) for p in others if p.requires_grad}
        for module in self.ddp if trainable else ():
            for name, p in module.module.named_parameters():
                if id(p) in trainable and name not in module.parameters_to_ignore:
                    raise ValueError(
                        f"{self._mode}: {name} (shape {tuple(p.shape)}) of the DistributedDataParallel in model= is not "
                        "among this optimizer's parameters, and its gradient would differ between ranks, as DDP averages "
                        "none during a step. Freeze it by requires_grad_(False), or use perturb_sync='global' with another "
                        "method"
                    )

    def align_buffers(self) -> None:
        """Before a pass: buffers as rank 0 had them before the step, where DDP is to keep them in line."""
        for buffers in self._buffers:
            buffers.align()

    def agreed(self) -> None:
        """All ranks have made all passes of this step."""
        for buffers in self._buffers:
            buffers.agreed()


class Exchange:
    """One flat buffer in which tensors are averaged over ranks, with what the ranks have to agree on behind them.

    Args:
        tensors: of one device and dtype; the buffer holds as many of their shapes.

    Attributes:
        views: the buffer as tensors of those shapes.
        skipped: 0-d, not 0 where a rank skips the step.
    """

    def __init__(self, tensors: Sequence[Tensor]):
        like = tensors[0]
        notes = torch.empty(1 + len(tensors), dtype=like.dtype, device=like.device)
        self.buffer, views = flat_views([*tensors, notes])
        self.skipped, self._had_one = (notes := views.pop())[0], notes[1:]
        self.views = TensorList(views, lasting=True)
        self._had: list[bool] = []

    def all_reduce(self, group: dist.ProcessGroup, had: list[bool], skipped: Any = 0.0) -> None:
        """Average over ranks. `had`: which tensors this rank has something for; `skipped`: not 0 if it skips the step."""
        self._had = list(had)
        if all(had):
            self._had_one.fill_(1.0)
        else:
            notes = torch.tensor(had, dtype=self._had_one.dtype, device="cpu")
            self._had_one.copy_(upload(notes, self._had_one.device))
        self.skipped.fill_(skipped)
        self.buffer.div_(dist.get_world_size(group))  # before the sum, as DDP does: no overflow that the mean has not
        dist.all_reduce(self.buffer, group=group)

    def present(self) -> TensorList:
        """The averaged tensors, None where no rank had one. Asks the device only where this rank had none."""
        if all(self._had):
            return self.views
        anywhere = (self._had_one != 0).tolist()
        return TensorList([t if has else None for t, has in zip(self.views.tensors, anywhere, strict=True)])
