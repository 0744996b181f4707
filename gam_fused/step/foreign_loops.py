"""Closures that training loops of other packages pass, where they would train wrongly and silently.

Loops are recognised by how they wrap the closure; none of their packages is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import partial, wraps
from typing import Any

from gam_fused.step.closures import BatchClosure

_MARK = "_runs_all_micro_batches"


def check_closure(closure: Any) -> None:
    """Refuses what is not callable, and what loops of other packages pass where that would train wrongly and silently.

    Raises:
        TypeError: not callable.
        RuntimeError: a Trainer that accumulates or clips gradients, or hooks that act on them, without `GAMCallback`;
            Accelerate's accumulation.
    """
    with_batch = isinstance(closure, BatchClosure)
    closure = closure.closure if with_batch else closure
    if not callable(closure):
        raise TypeError(
            f"step takes a function that computes the loss, which it calls once per pass, not a {type(closure).__name__}: "
            "optimizer.step(lambda: loss_fn(model(x), y))"
        )
    # Lightning wraps closures as `partial(precision._wrap_closure, module, optimizer, closure)`.
    if isinstance(closure, partial) and getattr(closure.func, "__name__", "") == "_wrap_closure":
        _check_lightning(closure.args[0], with_batch=with_batch)
    elif not hasattr(closure, _MARK):
        _check_accelerate()


def all_micro_batches(closure: Callable[..., Any]) -> Callable[..., Any]:
    """Marks `closure` as running all micro-batches of the step in every call: `optimizer.step(all_micro_batches(closure))`.

    With `Accelerator(gradient_accumulation_steps=n)`, whose `backward` divides by n, a closure that runs fewer micro-batches
    would silently train wrongly. Only its author can know that, so a closure that is not marked raises an error. Call `step`
    outside `accelerator.accumulate`, which leaves out n - 1 of n calls.
    """
    if isinstance(closure, BatchClosure):
        return BatchClosure(all_micro_batches(closure.closure), closure.batch, closure.cut)

    @wraps(closure)
    def marked(*batch: Any) -> Any:
        return closure(*batch)

    setattr(marked, _MARK, True)
    return marked


def overridden(thing: Any, hooks: Iterable[str]) -> list[str]:
    """Which of its `hooks` are overridden: differ from those of the base class that declares them."""
    result = []
    for name in hooks:
        declared = next((vars(c)[name] for c in reversed(type(thing).__mro__) if name in vars(c)), None)
        own = getattr(thing, name, None)
        if callable(own) and getattr(own, "__func__", own) is not declared:
            result.append(name)
    return result


def _check_lightning(module: Any, *, with_batch: bool) -> None:
    """Without `GAMCallback` a Trainer runs the last micro-batch only, and acts in each pass instead of once per step."""
    trainer, automatic = module.trainer, module.automatic_optimization
    settings, hooks = [], ["on_before_optimizer_step"]
    if automatic:
        hooks += ["configure_gradient_clipping", "on_before_zero_grad"]
        if trainer.accumulate_grad_batches > 1:
            settings.append(f"accumulate_grad_batches={trainer.accumulate_grad_batches}")
        if trainer.gradient_clip_val:
            settings.append(f"gradient_clip_val={trainer.gradient_clip_val}")
    told = [f"{type(thing).__name__}.{name}" for thing in (module, *trainer.callbacks) for name in overridden(thing, hooks)]
    if settings:
        what = f"Trainer({', '.join(settings)}): each pass of a step would see one micro-batch only, or clipped gradients"
    elif told:
        what = f"{', '.join(told)} would run in every pass of a step, on that pass's gradients, at perturbed weights"
    elif with_batch:
        what = "optimizer.step(closure, batch=batch): Lightning would call the closure without the batch"
    else:
        return
    raise RuntimeError(f"{what}. Add Trainer(callbacks=[gam_fused.integrations.lightning.GAMCallback()])")


def _check_accelerate() -> None:
    """`accelerator.accumulate` lets only the last micro-batch reach `step`, and `accelerator.backward` divides its loss."""
    accelerate = sys.modules.get("accelerate.optimizer")
    kind = getattr(accelerate, "AcceleratedOptimizer", None)
    if kind is None:
        return
    count = accelerate.GradientState().num_steps  # type: ignore[union-attr]  # one for all accelerators of the process
    if count > 1 and _is_called_by(kind.step):  # an optimizer that was not prepared is not affected
        raise RuntimeError(
            f"Accelerator(gradient_accumulation_steps={count}): in accelerator.accumulate a step would see the last of "
            f"{count} micro-batches only, and 1/{count} of its loss. Let the closure run all micro-batches, each loss "
            "divided by their number, and leave out gradient_accumulation_steps and accumulate. Or, if the closure does run "
            "all of them and it is accelerator.backward that divides, step outside of accumulate and say so: "
            "optimizer.step(gam_fused.integrations.all_micro_batches(closure))"
        )


def _is_called_by(function: Any) -> bool:
    code, frame = function.__code__, sys._getframe(1)
    while frame.f_back is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame.f_code is code
