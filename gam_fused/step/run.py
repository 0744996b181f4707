"""A step from its beginning to its end: completed, or rolled back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gam_fused.settings import Settings
from gam_fused.step.method import Method
from gam_fused.step.record import Record
from gam_fused.step.session import Session
from gam_fused.step.step import Step
from gam_fused.transaction.interrupts import Interrupts
from gam_fused.transaction.randomness import RandomState


def take(
    session: Session,
    settings: Settings,
    method: Method,
    passes: Callable[[Step], None],
    closure: Callable[[], Any],
    interrupts: Interrupts,
    random: RandomState | None = None,
) -> Step:
    """Run `passes` as one transaction: an exception in any leaves weights, buffers and generators as they were.

    Args:
        settings: what `session.prepare` has returned. random: what replays random numbers, instead of the session's.
    """
    step = Step(session, settings, _record(session, settings, method), closure, interrupts, random)
    try:
        passes(step)
        step.finish()
    except BaseException:
        session.failed = step.at
        step.abort()
        raise
    return step


def count(session: Session, record: Record) -> None:
    """A step has been taken."""
    session.steps_taken += 1
    session.last = record
    session.precision.look(record)


def radii(session: Session) -> list[float]:
    """rho of each perturbed param group, as it stands."""
    key = session.entries.rho_key
    return [float(group[key]) for group in session.param_groups if group["perturb"]]


def _record(session: Session, settings: Settings, method: Method) -> Record:
    plan = session.plan
    return Record(
        settings=settings,
        method=method,
        blocks=plan.blocks,
        shards=plan.shards,
        fsdp_modules=session.fsdp_modules,
        rhos=radii(session),
    )
