"""The numbers that Python, C++ and Triton agree on, as kernels see them: module constants only as constexpr."""

from __future__ import annotations

import triton.language as tl
from triton import knobs

from gam_fused.backends.tensor_lists import GROUP as _GROUP
from gam_fused.constants import Algorithm, Column, Control, Flag

GROUP = tl.constexpr(_GROUP)
RADIUS_0 = tl.constexpr(int(Column.RADIUS_0))
FOLD_0 = tl.constexpr(int(Column.FOLD_0))
FOLD_2 = tl.constexpr(int(Column.FOLD_2))
DIRECTION_G1 = tl.constexpr(int(Column.DIRECTION_G1))
DIRECTION_LAST = tl.constexpr(int(Column.DIRECTION_LAST))
DIRECTION_FOLDED = tl.constexpr(int(Column.DIRECTION_FOLDED))
FLAGS = tl.constexpr(int(Column.FLAGS))
LR = tl.constexpr(int(Column.LR))
WEIGHT_DECAY = tl.constexpr(int(Column.WEIGHT_DECAY))
MOMENTUM = tl.constexpr(int(Column.MOMENTUM))
DAMPENING = tl.constexpr(int(Column.DAMPENING))
BETA1 = tl.constexpr(int(Column.BETA1))
BETA2 = tl.constexpr(int(Column.BETA2))
EPS = tl.constexpr(int(Column.EPS))
MAX_RATIO = tl.constexpr(int(Column.MAX_RATIO))
ALPHA = tl.constexpr(int(Column.ALPHA))
COLUMNS = tl.constexpr(len(Column))
FOUND_INF = tl.constexpr(int(Control.FOUND_INF))
LAST_SKIPPED = tl.constexpr(int(Control.LAST_SKIPPED))
SKIPPED = tl.constexpr(int(Control.SKIPPED))
LOSS_SCALE = tl.constexpr(int(Control.LOSS_SCALE))
XI = tl.constexpr(int(Control.EPS))  # the paper's name, since EPS is Adam's here
MAX_NORM = tl.constexpr(int(Control.MAX_NORM))
NOISE_SEED = tl.constexpr(int(Control.NOISE_SEED))
NOISE_STEP = tl.constexpr(int(Control.NOISE_STEP))
NESTEROV = tl.constexpr(int(Flag.NESTEROV))
MAXIMIZE = tl.constexpr(int(Flag.MAXIMIZE))
AMSGRAD = tl.constexpr(int(Flag.AMSGRAD))
DECOUPLED = tl.constexpr(int(Flag.DECOUPLED))
SGD = tl.constexpr(int(Algorithm.SGD))
INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))
