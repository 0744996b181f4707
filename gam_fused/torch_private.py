"""All names of torch that are not public, behind names of our own. tests/test_private_names.py tells when one of them goes.

What can do without a name does (`getattr` with a default); the rest is torch.optim's contract with its own subclasses.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import OptState as OptState
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrize
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer
from torch.utils._pytree import tree_flatten as tree_flatten
from torch.utils._pytree import tree_is_leaf as tree_is_leaf
from torch.utils._pytree import tree_map_only as tree_map_only
from torch.utils._pytree import tree_unflatten as tree_unflatten

Function = TypeVar("Function")

# How many tensors share a storage, and its address, without making a Python object of it.
storage_use_count: Any = getattr(torch._C, "_storage_Use_Count", None)
storage_address: Any = getattr(torch._C, "_storage_address", None)

# Compares types, dtypes, devices, sizes and strides of many tensors in one call, as torch.compile does before it runs code.
_Guards: Any = getattr(getattr(getattr(torch._C, "_dynamo", None), "guards", None), "TensorGuards", None)

# What `backward` runs in every autograd.Function that is marked @once_differentiable.
_ONCE: Any = once_differentiable(lambda ctx: None).__code__

_OWN = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)
_GLOBAL = ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")


def not_traced(function: Function) -> Function:
    """A compiled function around it runs it as it is; what the closure has compiled stays compiled."""
    disable: Any = vars(torch)["_disable_dynamo"]
    wrapped: Function = disable(function)
    return wrapped


def complete(base: Optimizer) -> None:
    """Give the tables of hooks to an optimizer that lacks them: a wrapper that does not call torch's constructor."""
    for name in _OWN:
        if not hasattr(base, name):
            setattr(base, name, OrderedDict())


def has_step_hooks(base: Optimizer) -> bool:
    """Whether hooks of the optimizer's own are to be called around its `step`, or another one in its place, with the
    direction in `p.grad`."""
    return bool(base._optimizer_step_pre_hooks or base._optimizer_step_post_hooks) or _has_other_step(base)


def _has_other_step(base: Optimizer) -> bool:
    """Whether a `step` was assigned to the optimizer; an LR scheduler's wrapper of its class's own is none."""
    step: Any = vars(base).get("step")
    if getattr(step, "_wrapped_by_lr_sched", None) is True:
        step = step.__wrapped__
    return step is not None and getattr(step, "__func__", step) is not type(base).step


@contextmanager
def global_step_hooks_called() -> Iterator[None]:
    """For the time of a base optimizer's `step`: hooks of all optimizers are called for FusedGAM's step, not once more."""
    kept = {name: getattr(torch_optimizer, name) for name in _GLOBAL}
    if not any(kept.values()):
        yield
        return
    for name in _GLOBAL:
        setattr(torch_optimizer, name, type(kept[name])())
    try:
        yield
    finally:
        for name, hooks in kept.items():
            setattr(torch_optimizer, name, hooks)


def before_state_dict(optimizer: Optimizer) -> None:
    for hook in list(optimizer._optimizer_state_dict_pre_hooks.values()):
        hook(optimizer)


def after_state_dict(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """`state_dict`, or what a hook made in its place."""
    for hook in list(optimizer._optimizer_state_dict_post_hooks.values()):
        result = hook(optimizer, state_dict)
        state_dict = state_dict if result is None else result
    return state_dict


def before_load(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A shallow copy of `state_dict`, or what a hook made of it."""
    state_dict = state_dict.copy()
    for hook in list(optimizer._optimizer_load_state_dict_pre_hooks.values()):
        result = hook(optimizer, state_dict)
        state_dict = state_dict if result is None else result
    return state_dict


def after_load(optimizer: Optimizer) -> None:
    for hook in list(optimizer._optimizer_load_state_dict_post_hooks.values()):
        hook(optimizer)


def note_step_of_base(base: Optimizer) -> None:
    """As `base.step` does for an LR scheduler that watches it."""
    base._opt_called = True  # type: ignore[attr-defined]


def scaler_stage(scaler: Any, optimizer: Any) -> OptState:
    """What a `GradScaler` has seen of `optimizer` since its last `update`. Only errors depend on it."""
    states = getattr(scaler, "_per_optimizer_states", {})
    return states[id(optimizer)]["stage"] if id(optimizer) in states else OptState.READY


def device_types(group: Any) -> set[str]:
    """The types of the devices that a process group can communicate on."""
    return {device.type for device in group._device_types}


def default_store() -> Any:
    """The store that the processes found one another by; None where there is none, or not in this version."""
    get = getattr(sys.modules.get("torch.distributed.distributed_c10d"), "_get_default_store", lambda: None)
    try:
        return get()
    except (RuntimeError, ValueError, AssertionError):  # a backend that does without
        return None


def dtype_cast_to(node: Any) -> torch.dtype:
    """To which dtype a node of autograd's graph that casts has cast."""
    dtype: torch.dtype = node._input_metadata[0].dtype
    return dtype


def compared_with(tensors: Sequence[Tensor]) -> Callable[..., bool] | None:
    """A function that says whether as many objects are tensors of the same types, dtypes, devices, sizes and strides.

    It may deny what is true (where one tensor is given twice, or a context such as autocast has been entered since), and
    nothing else. None where torch cannot make one.
    """
    if _Guards is None or not tensors:
        return None
    try:
        alike: Callable[..., bool] = _Guards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
    except (RuntimeError, TypeError):  # of other arguments in another version; tensors without strides
        return None
    return alike


def is_view(t: Tensor) -> bool:
    return bool(t._is_view())


def forward_dtypes(fsdp: Iterable[Any]) -> set[torch.dtype]:
    """To which dtypes the mixed-precision policies of FSDP2 modules cast weights. Only an estimate asks."""
    policies = (getattr(getattr(m, "_get_fsdp_state", lambda: None)(), "_mp_policy", None) for m in fsdp)
    return {dtype for policy in policies if (dtype := getattr(policy, "param_dtype", None))}


def drop_pass_of_fsdp(module: Any) -> None:
    """After a pass that failed half-way: an FSDP2 module is sharded as between two passes, and holds no gradients of it."""
    state = module._get_fsdp_state()
    for group in _groups_of_fsdp(state):
        for p in group.fsdp_params:  # the next pass would add to these
            if (whole := getattr(p, "_unsharded_param", None)) is not None:
                whole.grad = None
            p.unsharded_accumulated_grad = None
    if not state._is_root:
        return
    if hasattr(module, "reset_iter_state"):
        module.reset_iter_state()
    else:
        _reset_root_of_fsdp(state)


def leaves_sums_of_fsdp(module: Any) -> bool:
    """Whether backward leaves an FSDP2 module's gradients on their ranks (`set_requires_gradient_sync(False)`)."""
    return not all(getattr(group, "reduce_grads", True) for group in _groups_of_fsdp(module._get_fsdp_state()))


def is_joining(module: Any) -> bool:
    """Whether a DDP module is inside its `join()`."""
    return bool(getattr(getattr(module, "_join_config", None), "enable", False))


def as_they_are() -> AbstractContextManager[None]:
    """Inside, subclasses of tensors are not asked how to do what is done with them."""
    return torch._C.DisableTorchFunctionSubclass()


def _groups_of_fsdp(state: Any) -> list[Any]:
    """What an FSDP2 module shards together; older versions of torch have one group, or none, for a module."""
    groups = getattr(state, "_fsdp_param_groups", None)
    return list(groups) if groups is not None else [g for g in [state._fsdp_param_group] if g is not None]


def _reset_root_of_fsdp(root: Any) -> None:
    """What `reset_iter_state` of newer versions of torch does."""
    idle = type(root._training_state).IDLE
    root._comm_ctx.all_gather_state = None
    root._comm_ctx.post_forward_order.clear()
    root._state_ctx.iter_forward_root, root._state_ctx.post_backward_final_callback_queued = None, False
    for state in root._state_ctx.all_states:
        state._training_state = idle
        for group in _groups_of_fsdp(state):
            group._training_state, group._all_gather_result, group._partial_reduce_output = idle, None, None
            group._post_forward_indices.clear()
            group.reshard()


def is_of_fsdp1(p: Tensor) -> bool:
    """Whether `p` is a flat parameter of FSDP1, or one that its use_orig_params=True leaves."""
    return any(getattr(p, mark, False) for mark in ("_is_flat_param", "_fsdp_flattened"))


def runs_cuda_graphs(device: torch.device) -> bool:
    """Whether torch.compile runs CUDA graphs on `device`, as with mode="reduce-overhead".

    What such a graph gives, gradients too, lies in memory that is taken back as soon as it runs again, without a reference
    that would tell. Which tensors are theirs is not asked: the answer differs while graphs are still being recorded.
    """
    trees: Any = sys.modules.get("torch._inductor.cudagraph_trees") if device.type == "cuda" else None
    if trees is None:
        return False
    find = getattr(trees, "get_manager", None)
    return find is None or find(device.index, create_if_none_exists=False) is not None


def forget_functions_of_weights() -> None:
    """Drop what contexts around a step keep: autocast's casts of weights, and weights of `parametrize.cached()`."""
    torch.clear_autocast_cache()
    getattr(parametrize, "_cache", {}).clear()


def has_hooks_after_backward(p: Tensor) -> bool:
    """Whether a hook sees `p.grad` as soon as backward has made it."""
    return bool(getattr(p, "_post_accumulate_grad_hooks", None))


def break_graph() -> None:
    """While torch.compile traces: what follows runs as it is."""
    torch._dynamo.graph_break()


def buffers_in(module: nn.Module) -> dict[str, Any]:
    """The dict that a module keeps its own buffers in."""
    return module._buffers


def parameters_in(module: nn.Module) -> dict[str, Any]:
    """The dict that a module keeps its own parameters in."""
    return module._parameters


def children_in(module: nn.Module) -> dict[str, Any]:
    """The dict that a module keeps its children in."""
    return module._modules


def values_of(t: Tensor) -> Tensor | None:
    """The tensor that a sparse one, coalesced or not, or a jagged one keeps its values in; None of others."""
    if t.layout is torch.strided or t.is_mkldnn:
        return None
    return t._values() if t.layout is torch.sparse_coo else t.values()


def once_differentiable_in(node: Any) -> str:
    """The name of the autograd.Function that a node of the graph belongs to, if that has no second derivative."""
    function: Any = getattr(node, "_forward_cls", None)
    once = function is not None and getattr(function.backward, "__code__", None) is _ONCE
    return function.__qualname__ if once else ""
