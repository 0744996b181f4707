"""State dicts, pickling, and the state of parameters that have not been updated yet.

What FusedGAM adds to torch.optim's layout are entries of the param groups, the one place that every tool that saves
optimizers keeps (torch.distributed.checkpoint knows no others): "rho", "perturb", and under "gam" the counters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from gam_fused.constants import Control
from gam_fused.sharding import local

if TYPE_CHECKING:
    from gam_fused.optimizer import FusedGAM

_NOT_PICKLED = ("_plan", "_last", "_precision_watch", "_counters", "step")  # "step": LR schedulers wrap it per instance
_SCHEDULED = ("rho_prime", "alpha", "beta", "gamma")


def device_counters(optimizer: FusedGAM) -> tuple[float, float]:
    """Skipped steps and the counter of the stochastic rounding. Waits for the device."""
    if optimizer._plan is None:
        return optimizer._counters
    control = optimizer._plan.buckets[0].control.tolist()
    return control[Control.SKIPPED], control[Control.NOISE_STEP]


def picklable(optimizer: FusedGAM) -> dict[str, Any]:
    """What pickle and deepcopy carry: everything but hooks, as torch.optim has it, and what is built anew from the rest."""
    kept = {k: v for k, v in optimizer.__dict__.items() if k not in _NOT_PICKLED and not k.startswith("_optimizer_")}
    return kept | {"_counters": device_counters(optimizer)}


def counters(optimizer: FusedGAM) -> dict[str, Any]:
    """What belongs to the whole optimizer: numbers and tuples of numbers. Every group carries all of it."""
    skipped, noise_step = device_counters(optimizer)
    entry = {"steps_taken": optimizer._steps_taken, "skipped_steps": int(skipped), "noise_step": int(noise_step)}
    return entry | {name: getattr(optimizer, name) for name in _SCHEDULED}


def load(optimizer: FusedGAM, state_dict: dict[str, Any], load_base: Callable[[dict[str, Any]], None]) -> None:
    """Load a state dict of FusedGAM or of its base optimizer's class; entries it lacks keep their present values."""
    state_dict = dict(state_dict)
    saved = state_dict["param_groups"]
    extra: dict[str, Any] = next((group["gam"] for group in saved if group.get("gam")), {})
    if len(saved) == len(optimizer.param_groups):
        present = [{k: g[k] for k in optimizer._gam_defaults} for g in optimizer.param_groups]
        state_dict["param_groups"] = [{**mine, **theirs} for mine, theirs in zip(present, saved, strict=True)]
    load_base(state_dict)
    if not extra:  # of the base optimizer's class
        return
    optimizer._steps_taken = int(extra["steps_taken"])
    optimizer._counters = (float(extra["skipped_steps"]), float(extra["noise_step"]))
    optimizer._plan = None
    for name in _SCHEDULED:
        value = extra[name]
        setattr(optimizer, name, tuple(value) if isinstance(value, list) else value)


def forget_plan(optimizer: FusedGAM) -> None:
    """Drop everything built from param groups and state that are not the optimizer's any more; counters stay."""
    optimizer._counters, optimizer._plan = device_counters(optimizer), None


def drop_unstarted(optimizer: FusedGAM) -> None:
    """Remove state that a skipped first step created: its parameter has not been updated yet, so torch would have none.

    Waits for the device.
    """
    if optimizer._plan is None or optimizer._fused is None:
        return
    for bucket in optimizer._plan.buckets:
        for p, count in zip(bucket.params, bucket.steps_buffer.tolist(), strict=True):
            entry = optimizer.state.get(p)
            if count == 0 and entry:
                keys = [k for k in ("step", "momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq") if k in entry]
                for key in keys:
                    del entry[key]
                if not entry:
                    del optimizer.state[p]


@torch.no_grad()
def create_state(optimizer: FusedGAM) -> None:
    """`step()` without a closure: one base step with zero gradients at lr 0, which creates the state and changes nothing.

    torch.distributed.checkpoint initialises optimizers that way before it loads into them.
    """
    groups = optimizer.param_groups
    params = [p for group in groups for p in group["params"]]
    idle = all(group.get("lr") is not None and float(group["lr"]) == 0.0 for group in groups)
    if not idle or any(p.grad is not None and bool(local(p.grad).count_nonzero()) for p in params):
        raise RuntimeError(
            "FusedGAM.step needs a closure that computes the loss, since every step makes several gradient passes: "
            "optimizer.step(closure). For loops that call it without, see gam_fused.integrations (Lightning, transformers)"
        )
    optimizer.base_optimizer.step()
    forget_plan(optimizer)
