"""The numbers that Python, C++ and Triton agree on: columns of the coefficient table, slots of the control block, flags.

`csrc/math/constants.h` repeats them; a test compares the two.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag

GUARD = 3  # slot of the last gradient's reduction, after those of the three ascents


class Column(IntEnum):
    """Columns of the coefficient table: float64 [number of param groups, len(Column)], one table per device."""

    RADIUS_0 = 0  # signed radius of the first ascent (negative where the group maximises, 0 where it is not perturbed)
    RADIUS_1 = 1  # of the second
    RADIUS_2 = 2  # of the third
    FOLD_0 = 3  # folded <- FOLD_0 * folded + FOLD_2 * x in the third ascent
    FOLD_2 = 4
    DIRECTION_G1 = 5  # d = plus_scale * (DIRECTION_G1 * g1 + DIRECTION_LAST * last) + DIRECTION_FOLDED * folded
    DIRECTION_LAST = 6
    DIRECTION_FOLDED = 7
    FLAGS = 8  # a sum of `Flag`
    LR = 9
    WEIGHT_DECAY = 10
    MOMENTUM = 11
    DAMPENING = 12
    BETA1 = 13
    BETA2 = 14
    EPS = 15
    MAX_RATIO = 16  # plus_scale = min(ALPHA, MAX_RATIO |h-| / (|h+| + xi)); 0: the projection of Algorithm 2
    ALPHA = 17


class Control(IntEnum):
    """Slots of the control block: float64 [len(Control)], one block per device."""

    FOUND_INF = 0  # 1 when a gradient of an earlier pass of this step was not finite; the first ascent sets it anew
    LAST_SKIPPED = 1  # 1 when the last step was skipped
    SKIPPED = 2  # number of skipped steps
    LOSS_SCALE = 3  # gradients are this many times too large (mixed precision); 1 without
    EPS = 4  # xi of the paper
    MAX_NORM = 5  # clip |d| to this; 0 for no clipping
    NOISE_SEED = 6  # seed of the stochastic rounding
    NOISE_STEP = 7  # its counter: updates so far


class Flag(IntFlag):
    """Per-group switches of the base optimizer."""

    NESTEROV = 1
    MAXIMIZE = 2
    AMSGRAD = 4
    DECOUPLED = 8  # weight decay as in AdamW


class Algorithm(IntEnum):
    """Base optimizers whose update is fused."""

    SGD = 0
    ADAM = 1
