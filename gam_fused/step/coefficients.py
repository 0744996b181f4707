"""The coefficients of DESIGN section 2: which numbers make the kernels compute which method.

Three tables per device: "gam" for a step of the method, "plain" for a step between (`interval`), "oracle" for the extra
ascent of the SAM oracle. One row per param group.
"""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING, Any

from torch import Tensor

from gam_fused.checks import number as finite
from gam_fused.constants import Column
from gam_fused.settings import Hyperparameters, pair

if TYPE_CHECKING:
    from gam_fused.backends.base_optimizers import FusedBase

Row = list[float | Tensor]


def tables(
    method: str,
    values: Hyperparameters,
    sam_rho: float | None,
    param_groups: list[dict[str, Any]],
    base: FusedBase | None,
    rho_key: str = "rho",
) -> dict[str, list[Row]]:
    """All coefficient tables, from the hyperparameters as they stand now.

    Raises:
        ValueError, TypeError: one that is not a finite number; names it and its group.
    """
    result: dict[str, list[Row]] = {"gam": [], "plain": [], "oracle": []}
    for number, group in enumerate(param_groups):
        # What a base optimizer that is not fused makes of its own entries is its own business.
        shared = _of_base(number, group, base) if base else {}
        sign = -1.0 if group.get("maximize") else 1.0  # the loss of a maximising group is -L: its worst case lies downhill
        counted = 1.0 if group["perturb"] else 0.0
        result["gam"].append(_row(shared | _METHODS[method](values, float(group[rho_key]), sign, counted)))
        result["plain"].append(_row(shared | {Column.DIRECTION_LAST: 1.0}))
        if sam_rho is not None:
            result["oracle"].append(_row(shared | {Column.RADIUS_0: sign * counted * sam_rho, Column.DIRECTION_LAST: 1.0}))
    return {kind: rows for kind, rows in result.items() if rows}


def _of_base(number: int, group: dict[str, Any], base: FusedBase) -> dict[Column, Any]:
    try:
        return _checked(number, {Column.LR: group["lr"]} | base.coefficients(group))
    except KeyError as error:
        raise KeyError(f"param group {number} has no entry {error}, which the base optimizer needs") from error


def _row(entries: dict[Column, float | Tensor]) -> Row:
    row: Row = [0.0] * len(Column)
    for column, value in entries.items():
        row[column] = value
    return row


def _checked(number: int, entries: dict[Column, Any]) -> dict[Column, Any]:
    """Finite floats; a learning rate that lies on a device stays there, since asking for it would wait."""
    for column, value in entries.items():
        stays = value.device.type != "cpu" if isinstance(value, Tensor) else type(value) is float and isfinite(value)
        if not stays:
            entries[column] = finite(f"{column.name.lower()} of group {number}", value)
    return entries


def _sam(values: Hyperparameters, rho: float, sign: float, counted: float) -> dict[Column, float]:
    """d = g1."""
    return {Column.RADIUS_0: sign * counted * rho, Column.DIRECTION_LAST: 1.0}


def _probe(values: Hyperparameters, rho: float, sign: float, counted: float) -> dict[Column, float]:
    """theta1, theta2 and theta3 of Appendix D."""
    near, far = sign * counted * values.rho_prime, sign * counted * rho
    return {Column.RADIUS_0: near, Column.RADIUS_1: far, Column.RADIUS_2: near}


def _finite_difference(values: Hyperparameters, rho: float, sign: float, counted: float) -> dict[Column, float]:
    """d = g0 + (alpha rho / rho') (g3 - g2): folded = g0 - c g2, then d = folded + c g3."""
    c = values.alpha * rho / values.rho_prime
    return _probe(values, rho, sign, counted) | {
        Column.FOLD_0: 1.0,
        Column.FOLD_2: -c,
        Column.DIRECTION_LAST: c,
        Column.DIRECTION_FOLDED: 1.0,
    }


def _accelerated(values: Hyperparameters, rho: float, sign: float, counted: float) -> dict[Column, float]:
    """Algorithm 2: folded = h- = beta0 g0 + beta1 g2, h+ = alpha0 g1 + alpha1 g3, d = (1 + gamma s) h+ - gamma h-."""
    alpha, beta = pair(values.alpha), pair(values.beta)
    return _probe(values, rho, sign, counted) | {
        Column.FOLD_0: beta[0],
        Column.FOLD_2: beta[1],
        Column.DIRECTION_G1: alpha[0],
        Column.DIRECTION_LAST: alpha[1],
        Column.DIRECTION_FOLDED: -values.gamma,
    }


def _exact(values: Hyperparameters, rho: float, sign: float, counted: float) -> dict[Column, float]:
    """d = g + alpha rho H(theta_adv) v_adv, where v = g / |g|, turned round by `ascent` where a group maximises."""
    return {Column.RADIUS_0: sign * counted * rho, Column.DIRECTION_LAST: values.alpha * rho, Column.DIRECTION_FOLDED: 1.0}


_METHODS = {
    "sam": _sam,
    "finite_difference": _finite_difference,
    "accelerated": _accelerated,
    "exact": _exact,
}
