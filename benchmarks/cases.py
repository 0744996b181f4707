"""What every measurement is named by, and what the suites of a run share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch


@dataclass(frozen=True)
class Case:
    """One contestant in one block.

    Attributes:
        cell: what is compared with each other, such as a network; ratios are taken within a cell.
        contestant: its name there.
        block: how often the cell has been measured before. Every block measures all contestants of a cell, so that drift
            of the machine meets all alike; ratios are taken within a block.
        what: how to build it; the suite's own.
    """

    cell: str
    contestant: str
    block: int
    what: Any = None

    def __str__(self) -> str:
        return f"{self.cell} | {self.contestant} | {self.block}"


class Plan(NamedTuple):
    """On what, and how much, a run measures; `rehearse`: tiny sizes, all once, which shows that it runs."""

    device: torch.device
    rehearse: bool = False

    @property
    def blocks(self) -> int:
        """How often each cell is measured, where there is time."""
        return 1 if self.rehearse else 3


def blocks_of(cell: str, contestants: dict[str, Any], plan: Plan, blocks: int | None = None) -> list[Case]:
    """A cell's cases: block by block (`plan` says how many), all contestants in each, every block beginning with another."""
    entries = list(contestants.items())
    turns = [entries[(k := block % len(entries)) :] + entries[:k] for block in range(blocks or plan.blocks)]
    return [Case(cell, name, block, what) for block, turn in enumerate(turns) for name, what in turn]
