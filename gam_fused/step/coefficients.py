"""The coefficient tables: which numbers make the kernels compute which method, one row per param group.

Tables per device: "method" for a step of the method, "plain" for a step between (`interval`), "oracle" for the ascent of the
SAM oracle, and the method's own `combinations`.
"""

from __future__ import annotations

from math import isfinite
from typing import Any

from torch import Tensor

from gam_fused.backends.base_optimizers import FusedBase
from gam_fused.checks import Groups
from gam_fused.checks import number as finite
from gam_fused.constants import Column
from gam_fused.settings import Settings
from gam_fused.step.method import Coefficients, Method

Row = list[float | Tensor]


def tables(method: Method, settings: Settings, groups: Groups, rho_key: str, base: FusedBase | None) -> dict[str, list[Row]]:
    """All coefficient tables, from the hyperparameters as they stand now.

    Args:
        settings: checked. rho_key: the groups' entry with their rho.

    Raises:
        ValueError, TypeError: a number of a fused base optimizer that is not finite; names it and its group. Other base
            optimizers check their own.
    """
    result: dict[str, list[Row]] = {"method": [], "plain": []}
    for number, group in enumerate(groups):
        shared = _of_base(number, group, base) if base else {}
        # The loss of a maximising group is -L: its worst case lies downhill.
        sign = 0.0 if not group["perturb"] else -1.0 if group.get("maximize") else 1.0
        result["method"].append(_row(shared, method.coefficients(settings, float(group[rho_key])), sign))
        result["plain"].append(_row(shared, Coefficients()))
        if settings.oracle_radius is not None:
            oracle = Coefficients(radii=(settings.oracle_radius, 0.0, 0.0))
            result.setdefault("oracle", []).append(_row(shared, oracle, sign))
        if settings.on_part:
            for name, combination in method.combinations.items():
                result.setdefault(name, []).append(_row(shared, combination(settings)))
    return result


def _row(shared: dict[Column, Any], c: Coefficients, sign: float = 0.0) -> Row:
    row: Row = [0.0] * len(Column)
    for i, radius in enumerate(c.radii):
        row[Column.RADIUS_0 + i] = sign * radius
    row[Column.FOLD_0], row[Column.FOLD_2] = c.fold
    row[Column.DIRECTION_G1], row[Column.DIRECTION_LAST], row[Column.DIRECTION_FOLDED] = c.g1, c.last, c.folded
    row[Column.ALPHA], row[Column.MAX_RATIO] = c.alpha, c.max_ratio
    for column, value in shared.items():
        row[column] = value
    return row


def _of_base(number: int, group: dict[str, Any], base: FusedBase) -> dict[Column, Any]:
    try:
        return _checked(number, {Column.LR: group["lr"]} | base.coefficients(group))
    except KeyError as error:
        raise KeyError(f"param group {number} has no entry {error}, which the base optimizer requires") from error


def _checked(number: int, entries: dict[Column, Any]) -> dict[Column, Any]:
    """Finite floats; a learning rate that lies on a device stays there, since asking for it would wait."""
    for column, value in entries.items():
        stays = value.device.type != "cpu" if isinstance(value, Tensor) else type(value) is float and isfinite(value)
        if not stays:
            entries[column] = finite(f"{column.name.lower()} of group {number}", value)
    return entries
