// The numbers that Python, C++ and Triton agree on. They repeat gam_fused/constants.py and
// gam_fused/backends/operators.py; tests/test_kernels.py compares them.
#pragma once

namespace gam {

struct Column {
  enum : int {
    RADIUS_0 = 0,
    RADIUS_1 = 1,
    RADIUS_2 = 2,
    FOLD_0 = 3,
    FOLD_2 = 4,
    DIRECTION_G1 = 5,
    DIRECTION_LAST = 6,
    DIRECTION_FOLDED = 7,
    FLAGS = 8,
    LR = 9,
    WEIGHT_DECAY = 10,
    MOMENTUM = 11,
    DAMPENING = 12,
    BETA1 = 13,
    BETA2 = 14,
    EPS = 15,
    MAX_RATIO = 16,
    ALPHA = 17,
  };
};
constexpr int COLUMNS = 18;

struct Control {
  enum : int {
    FOUND_INF = 0,
    LAST_SKIPPED = 1,
    SKIPPED = 2,
    LOSS_SCALE = 3,
    EPS = 4,
    MAX_NORM = 5,
    NOISE_SEED = 6,
    NOISE_STEP = 7,
  };
};
constexpr int CONTROLS = 8;

struct Flag {
  enum : int { NESTEROV = 1, MAXIMIZE = 2, AMSGRAD = 4, DECOUPLED = 8 };
};

struct Algorithm {
  enum : int { SGD = 0, ADAM = 1 };
  static constexpr int COUNT = 2;
};

struct DType {
  enum : int { FLOAT32 = 0, FLOAT64 = 1, BFLOAT16 = 2, FLOAT16 = 3 };
};

}  // namespace gam
