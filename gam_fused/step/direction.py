"""What the combined direction d is made of."""

from __future__ import annotations

from dataclasses import dataclass

from gam_fused.backends.tensor_lists import TensorList

Lists = list[TensorList]


@dataclass(frozen=True)
class Direction:
    """d = plus_scale * (c_g1 * g1 + c_last * last) + minus * folded, with one `TensorList` per block in each operand.

    The weights are those of the coefficient table; plus_scale is 1, but where there is a g1: see `Coefficients`.

    Attributes:
        last: the gradients of the last pass. g1: those of an earlier one. folded: those that were accumulated.
        table: which coefficient table.
    """

    last: Lists
    g1: Lists | None = None
    folded: Lists | None = None
    table: str = "method"

    @property
    def rows(self) -> int:
        """How many rows of partial sums it takes: three products, or one, over counted tensors and over the others."""
        return 6 if self.g1 else 2

    def of(self, block: int) -> list[TensorList]:
        """The operands of one block that there are."""
        return [lists[block] for lists in (self.g1, self.last, self.folded) if lists]
