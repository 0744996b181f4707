"""What each kernel takes: one record per kernel, the twin of `csrc/operands.h`, field by field and in its order.

Schemas, fakes and checks of arguments follow from the fields' kinds, so that an operand is named here, in the C++ struct and
in the kernels alone. `backends/reference.py` specifies what the kernels do with them. Common to all:

    layout        `Layout` of the block: tensor sizes, param groups, which tensors count in norms.
    lists         `TensorList`s of that layout; `EMPTY` where an operand is not used; `None` entries are zero vectors.
    coefficients  float64 [groups, len(Column)], on the block's device.
    control       float64 [len(Control)], on the block's device.
    partials      float64 [2 * k, P]: row 2*j holds sums of the j-th product over counted tensors, row 2*j + 1 over the
                  others, which are guarded but not counted. A kernel that makes them fills its block's own column; one
                  that needs them adds up those of all blocks, which stand side by side: a few numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from operator import attrgetter
from typing import Annotated, Any, get_args, get_type_hints

from torch import Tensor

from gam_fused.backends.tensor_lists import EMPTY, Layout, TensorList

# ----------------------------------------------------------------------------------------------------------------------
# Kinds of operands. `csrc/operands.h` has the same names.


@dataclass(frozen=True)
class OfTensors:
    """A list of tensors.

    Attributes:
        dtype: "storage" (the parameters' own), "compute" (float64 for float64, else float32) or "counter" (0-d float32).
        complete: whether no tensor may be missing, if the list is there.
        written: whether the kernel writes to it.
        saved: whether others see the tensors: a graph of autograd may have saved them, and has to be told that they changed.
    """

    dtype: str = "storage"
    complete: bool = False
    written: bool = False
    saved: bool = False


@dataclass(frozen=True)
class OfNumbers:
    """A float64 tensor. `written`: whether the kernel writes to it."""

    written: bool = False


@dataclass(frozen=True)
class OfSums:
    """float64 sums. `rows`: how many there may be. `written`: the kernel's own column, else those of all blocks."""

    rows: tuple[int, ...]
    written: bool = False


@dataclass(frozen=True)
class Scalar:
    """A number or a switch. `compiled_in`: whether Triton's kernels are compiled for each of its values."""

    type: type
    compiled_in: bool = True


Weights = Annotated[TensorList, OfTensors(complete=True, written=True, saved=True)]
Point = Annotated[TensorList, OfTensors(complete=True)]
Backup = Annotated[TensorList, OfTensors(complete=True, written=True)]
Gradients = Annotated[TensorList, OfTensors()]
Directions = Annotated[TensorList, OfTensors(written=True)]
Folded = Annotated[TensorList, OfTensors("compute")]
Folding = Annotated[TensorList, OfTensors("compute", written=True)]
State = Annotated[TensorList, OfTensors(written=True, saved=True)]
Counters = Annotated[TensorList, OfTensors("counter", written=True, saved=True)]
Coefficients = Annotated[Tensor, OfNumbers()]
Control = Annotated[Tensor, OfNumbers(written=True)]
Norm = Annotated[Tensor, OfSums((2,), written=True)]
Products = Annotated[Tensor, OfSums((2, 6), written=True)]
Squares = Annotated[Tensor, OfSums((1,), written=True)]
NormTotals = Annotated[Tensor, OfSums((2,))]
ProductTotals = Annotated[Tensor, OfSums((2, 6))]
Ascent = Annotated[int, Scalar(int, compiled_in=False)]
Switch = Annotated[bool, Scalar(bool)]
BaseOptimizer = Annotated[int, Scalar(int)]


# ----------------------------------------------------------------------------------------------------------------------
# The records. Not frozen: one is made per launch, and that takes the host twice as long.


@dataclass(kw_only=True, slots=True)
class SquaredNorm:
    """Of `squared_norm`: partials <- sums of ((x - y) * weight)^2."""

    layout: Layout
    x: Gradients
    y: Gradients = EMPTY
    weight: Gradients = EMPTY
    partials: Norm


@dataclass(kw_only=True, slots=True)
class DirectionProducts:
    """Of `direction_products`: partials <- sums of h+ h+, h- h+ and h- h-, or, without `g1`, of d^2."""

    layout: Layout
    g1: Gradients = EMPTY
    last: Gradients
    folded: Folded = EMPTY
    coefficients: Coefficients
    partials: Products


@dataclass(kw_only=True, slots=True)
class Perturb:
    """Of `perturb_`: theta <- base + radius * (x - y) / (norm + xi).

    Attributes:
        base: the point to start from; `EMPTY` means theta itself.
        x, y: the gradients.
        folded: folded <- FOLD_0 * folded + FOLD_2 * x. backup: backup <- theta before it is perturbed.
        realised: the sum of (theta - base)^2 as stored.
        ascent: 0, 1 or 2: which radius; 0 also clears control[FOUND_INF] of the step before.
        adaptive: theta <- base + radius * base^2 * (x - y) / norm.
    """

    layout: Layout
    theta: Weights
    base: Point = EMPTY
    x: Gradients
    y: Gradients = EMPTY
    folded: Folding = EMPTY
    backup: Backup = EMPTY
    coefficients: Coefficients
    partials: NormTotals
    control: Control
    realised: Squares
    ascent: Ascent
    adaptive: Switch = False


@dataclass(kw_only=True, slots=True)
class CombinedUpdate:
    """Of `combined_update_`: theta <- the base optimizer's update of `backup`, or of theta where that is `EMPTY`.

    Attributes:
        g1, last, folded: what the direction d is made of.
        state1, state2, state3: SGD's momentum buffer; Adam's exp_avg, exp_avg_sq, max_exp_avg_sq.
        steps: updates so far of each tensor; advanced here.
        direction: the sum of d^2.
        algorithm: an `Algorithm`.
    """

    layout: Layout
    theta: Weights
    backup: Point = EMPTY
    g1: Gradients = EMPTY
    last: Gradients
    folded: Folded = EMPTY
    state1: State = EMPTY
    state2: State = EMPTY
    state3: State = EMPTY
    steps: Counters
    coefficients: Coefficients
    partials: ProductTotals
    control: Control
    direction: Squares
    algorithm: BaseOptimizer


@dataclass(kw_only=True, slots=True)
class Combine:
    """Of `combine_`: out <- d. `out` may be `last` itself; where it has `None`, nothing is done."""

    layout: Layout
    out: Directions
    g1: Gradients = EMPTY
    last: Gradients
    folded: Folded = EMPTY
    coefficients: Coefficients
    partials: ProductTotals
    control: Control
    direction: Squares


@dataclass(kw_only=True, slots=True)
class Restore:
    """Of `restore_`: theta <- backup, bit for bit; and of `copy_`, for memory that no graph of autograd has saved."""

    layout: Layout
    theta: Weights
    backup: Point


# ----------------------------------------------------------------------------------------------------------------------
# The kernels.


class Backend:
    """What every backend has, be it an object or a module. The kernels are what takes a record.

    Attributes:
        copy_: `restore_`, of memory that no graph of autograd has saved.
        reason: gives "" where the backend can be used, else why not and what to do about it.
    """

    squared_norm: Callable[[SquaredNorm], None]
    direction_products: Callable[[DirectionProducts], None]
    perturb_: Callable[[Perturb], None]
    combined_update_: Callable[[CombinedUpdate], None]
    combine_: Callable[[Combine], None]
    restore_: Callable[[Restore], None]
    copy_: Callable[[Restore], None]
    reason: Callable[[], str]


class Kernel:
    """What a kernel's record tells about its operands.

    Attributes:
        name: of the kernel. stem: of its source files.
        lists: the fields that are lists, in order. rest: those after them. required: lists that may not be `EMPTY`.
        lists_of, rest_of: their values in a record.
        saved: names of the lists whose change autograd is told of. sums: whether it adds up anything.
    """

    def __init__(self, name: str, record: type):
        self.name, self.stem, self.record = name, name.rstrip("_"), record
        hints = get_type_hints(record, include_extras=True)
        kinds = {field.name: hints[field.name].__metadata__[0] for field in fields(record) if field.name != "layout"}
        self.lists: dict[str, OfTensors] = {n: k for n, k in kinds.items() if isinstance(k, OfTensors)}
        self.rest: dict[str, Any] = {n: k for n, k in kinds.items() if n not in self.lists}
        self.required = {f.name for f in fields(record) if f.name in self.lists and f.default is not EMPTY}
        self.saved = tuple(n for n, kind in self.lists.items() if kind.saved)
        self.sums = any(isinstance(kind, OfSums) and kind.written for kind in self.rest.values())
        self.lists_of: Callable[[Any], tuple[TensorList, ...]] = _getter(*self.lists)
        self.rest_of: Callable[[Any], tuple[Any, ...]] = _getter(*self.rest)

    def tell_autograd(self, operands: Any) -> None:
        """That weights and state in `operands` changed: a graph that saved them must not be used any more."""
        for name in self.saved:
            getattr(operands, name).written()


def _getter(*names: str) -> Callable[[Any], tuple[Any, ...]]:
    if len(names) > 1:
        return attrgetter(*names)
    one = attrgetter(*names) if names else None
    return lambda record: (one(record),) if one else ()


_RECORDS = {name: get_args(hint)[0] for name, hint in get_type_hints(Backend).items() if name != "copy_"}
KERNELS = {name: Kernel(name, *taken) for name, taken in _RECORDS.items() if taken}


class LaunchingBackend(Backend, ABC):
    """A backend that launches all kernels in one way, `launch`."""

    def __init__(self) -> None:
        for name, kernel in KERNELS.items():
            setattr(self, name, partial(self.launch, kernel))
        self.copy_ = partial(self.launch, KERNELS["restore_"], saved=False)

    def copier(self, operands: Restore) -> Callable[[], object]:
        """`copy_` of lists that last, to be called again and again."""
        return partial(self.copy_, operands)

    @abstractmethod
    def launch(self, kernel: Kernel, operands: Any, *, saved: bool = True) -> None:
        """Run `kernel`. `saved`: whether a graph of autograd may have saved what it writes, and is told of the change."""
