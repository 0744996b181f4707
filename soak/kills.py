"""Trainings that are killed at random moments and go on from their checkpoints end in the bits of one that was not."""

from __future__ import annotations

from typing import Any

from soak.turns import Turns

TIMES = 12  # that one training is killed


def run(seconds: float = float("inf"), number: int = 0, times: int = TIMES) -> dict[str, Any]:
    """A training with each base, whatever that takes."""
    from test_dcp import KILLED, kill_and_resume

    turns, kills = Turns("kills", count=len(KILLED)), 0
    for turn, base in zip(turns, KILLED, strict=False):
        try:
            kill_and_resume(times, base, 1000 * number + turn)
            kills += times
        except Exception as error:
            turns.fail(f"{base}: {type(error).__name__}: {error}")
    return turns.figures(kills=kills)
