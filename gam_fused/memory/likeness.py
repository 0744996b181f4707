"""Checks of many tensors at once that look at each of them only where something differs from the last time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gam_fused.torch_private import compared_with


class Remembered:
    """A check whose answer follows from the types, dtypes, devices, sizes and strides of tensors, always as many.

    Asking every tensor for each of these in every pass is most of a step's host time. So all are compared in one call with
    those that passed last, and only where one differs the check itself is made.
    """

    def __init__(self, check: Callable[[Sequence[Any]], bool]):
        self._check = check
        self._like_the_last: Callable[..., bool] | None = None

    def __call__(self, tensors: Sequence[Any]) -> bool:
        like = self._like_the_last
        if like is not None and like(*tensors):
            return True
        if not self._check(tensors):
            return False
        self._like_the_last = compared_with(tensors)
        return True
