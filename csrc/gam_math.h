// Every formula of Gradient norm Aware Minimization once, on scalars, for CPU and CUDA kernels. No torch here.
//
// Zhang et al., "Gradient Norm Aware Minimization Seeks First-Order Flatness and Improves Generalization", CVPR 2023,
// arXiv 2303.03108: Algorithm 1, appendix D (Hessian-vector products from gradients), Algorithm 2 (appendix).
// The executable specification is gam_fused/backends/reference.py. C is the compute type: float for float, bfloat16 and
// float16 storage, double for double.
#pragma once

#include <math.h>

#include "low_precision.h"

namespace gam {

// The numbers below repeat gam_fused/constants.py and gam_fused/backends/operators.py; tests/test_kernels.py compares
// them.

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
  };
};
constexpr int COLUMNS = 16;

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
    TICKET = 8,
  };
};
constexpr int CONTROLS = 9;

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

// float and double versions of what differs by name in C.
GAM_HOST_DEVICE float square_root(float x) { return sqrtf(x); }
GAM_HOST_DEVICE double square_root(double x) { return sqrt(x); }

GAM_HOST_DEVICE bool is_finite(double x) { return fabs(x) <= 1.7976931348623157e308; }

// Weights may be infinite (masks). What does not move stays there, as in torch: 0 * inf and inf - inf, both NaN, are
// not computed.

// step * factor; 0 where `step` is 0.
template <class C>
GAM_HOST_DEVICE C times(C step, C factor) {
  return step * (step == C(0) ? C(0) : factor);
}

// to - from; 0 where they are equal.
template <class C>
GAM_HOST_DEVICE C change_of(C to, C from) {
  return to == from ? C(0) : to - from;
}

// ---------------------------------------------------------------------------------------------------------------------
// Ascents: lines 6 and 7 of Algorithm 1, with the gradients of appendix D.

// radius / (|x| + eps) for gradients that are `loss_scale` times too large, `total` the sum of their squares. Along
// x = 0 nothing moves, whatever eps: 0 in place of a division by zero, and a bound that float can hold.
GAM_HOST_DEVICE double ascent_scale(double radius, double total, double loss_scale, double eps) {
  constexpr double BOUND = 3e38;
  double norm = sqrt(total) / loss_scale + eps;
  double scale = norm > 0.0 ? radius / norm / loss_scale : 0.0;
  return scale > BOUND ? BOUND : scale < -BOUND ? -BOUND : scale;
}

// base + scale * (x - y).
template <class C>
GAM_HOST_DEVICE C ascend(C base, C scale, C x, C y) {
  return base + scale * (x - y);
}

// base + scale * base^2 * (x - y): element-wise scaling as in ASAM.
template <class C>
GAM_HOST_DEVICE C ascend_adaptive(C base, C scale, C x, C y) {
  return base + times(scale * (x - y), base * base);
}

// What later directions need of g0 and g2, kept in one vector: folded <- FOLD_0 folded + FOLD_2 x.
template <class C>
GAM_HOST_DEVICE C fold(C c0, C folded, C c2, C x) {
  return c0 * folded + c2 * x;
}

// ---------------------------------------------------------------------------------------------------------------------
// The direction d: h_loss + alpha h_norm (Algorithm 1, line 10), or Algorithm 2's h+ - gamma (h- minus its projection).

// plus_scale of Algorithm 2, and the factor that undoes the loss scale and clips |d|.
struct DirectionScale {
  double plus_scale, unscale;
};

// `total`: sums over counted and over other tensors of h+ h+, h- h+ and h- h- (rows = 6), or of d^2 (rows = 2).
GAM_HOST_DEVICE DirectionScale direction_scale(const double* total, int rows, double minus, double loss_scale,
                                               double max_norm) {
  double plus_scale = 1.0, squared = total[0] + total[1];
  if (rows == 6) {
    plus_scale = 1.0 - minus * (total[0] > 0.0 ? total[2] / total[0] : 0.0);
    squared = plus_scale * plus_scale * squared + 2.0 * plus_scale * minus * (total[2] + total[3]) +
              minus * minus * (total[4] + total[5]);
  }
  double clip = 1.0;
  if (max_norm > 0.0) {
    double norm = is_finite(squared) ? sqrt(squared > 0.0 ? squared : 0.0) / loss_scale : INFINITY;
    clip = max_norm / (norm + 1e-6);
    clip = clip < 1.0 ? clip : 1.0;
  }
  return {plus_scale, clip / loss_scale};
}

template <class C>
struct Direction {
  C g1, last, folded;
};

// Coefficients of g1, last and folded in d, from a row of the coefficient table.
template <class C>
GAM_HOST_DEVICE Direction<C> direction_of(const double* row, DirectionScale scale) {
  double plus = scale.plus_scale * scale.unscale;
  return {C(plus * row[Column::DIRECTION_G1]), C(plus * row[Column::DIRECTION_LAST]),
          C(scale.unscale * row[Column::DIRECTION_FOLDED])};
}

template <class C>
GAM_HOST_DEVICE C h_plus(const Direction<C>& k, C g1, C last) {
  return k.g1 * g1 + k.last * last;
}

template <class C>
GAM_HOST_DEVICE C direction(const Direction<C>& k, C g1, C last, C folded) {
  return h_plus(k, g1, last) + k.folded * folded;
}

// ---------------------------------------------------------------------------------------------------------------------
// Base optimizers, in torch.optim's order of operations.

// old + step, where a step of zero leaves the bits alone (-0.0 + 0.0 would be 0.0).
template <class C>
GAM_HOST_DEVICE C advance(C old, C step) {
  return step == C(0) ? old : old + step;
}

// d + weight_decay * theta; d alone where there is no weight decay.
template <class C>
GAM_HOST_DEVICE C decayed(C d, C weight_decay, C theta) {
  return weight_decay == C(0) ? d : d + weight_decay * theta;
}

template <class C>
struct Sgd {
  C lr, weight_decay, momentum, gain;  // gain: 1 - dampening
  C sign;                              // -1 where the group maximises
  bool nesterov, first;                // first: the momentum starts as d itself
};

template <class C>
GAM_HOST_DEVICE Sgd<C> sgd_of(const double* row, double step) {
  int flags = int(row[Column::FLAGS]);
  return {C(row[Column::LR]),
          C(row[Column::WEIGHT_DECAY]),
          C(row[Column::MOMENTUM]),
          C(1.0 - row[Column::DAMPENING]),
          C(flags & Flag::MAXIMIZE ? -1 : 1),
          (flags & Flag::NESTEROV) != 0,
          step == 1.0};
}

template <class C>
GAM_HOST_DEVICE C sgd(const Sgd<C>& h, C theta, C d) {
  d = decayed(h.sign * d, h.weight_decay, theta);
  return advance(theta, times(-h.lr, d));
}

template <class C>
GAM_HOST_DEVICE C sgd_momentum(const Sgd<C>& h, C theta, C d, C& momentum_buffer) {
  d = decayed(h.sign * d, h.weight_decay, theta);
  C moved = h.momentum * momentum_buffer + h.gain * d;
  moved = h.first ? d : moved;
  momentum_buffer = moved;
  C ahead = d + h.momentum * moved;
  return advance(theta, times(-h.lr, h.nesterov ? ahead : moved));
}

template <class C>
struct Adam {
  C size;          // -lr / (1 - beta1^step)
  C root;          // sqrt(1 - beta2^step)
  C decay, l2;     // decoupled weight decay as a factor of theta, or L2 regularisation as a term of d
  C gain1;         // 1 - beta1
  C beta2, gain2;  // gain2: 1 - beta2
  C eps, sign;
};

template <class C>
GAM_HOST_DEVICE Adam<C> adam_of(const double* row, double step) {
  int flags = int(row[Column::FLAGS]);
  double lr = row[Column::LR], beta1 = row[Column::BETA1], beta2 = row[Column::BETA2];
  double weight_decay = row[Column::WEIGHT_DECAY];
  bool decoupled = (flags & Flag::DECOUPLED) != 0;
  return {C(-lr / (1.0 - pow(beta1, step))),
          C(sqrt(1.0 - pow(beta2, step))),
          C(decoupled ? 1.0 - lr * weight_decay : 1.0),
          C(decoupled ? 0.0 : weight_decay),
          C(1.0 - beta1),
          C(beta2),
          C(1.0 - beta2),
          C(row[Column::EPS]),
          C(flags & Flag::MAXIMIZE ? -1 : 1)};
}

// Adam and AdamW. AMSGRAD: `maximum` is max_exp_avg_sq; without, it is neither read nor written.
template <bool AMSGRAD, class C>
GAM_HOST_DEVICE C adam(const Adam<C>& h, C theta, C d, C& exp_avg, C& exp_avg_sq, C& maximum) {
  d = decayed(h.sign * d, h.l2, theta);
  theta = h.decay * theta;
  exp_avg = exp_avg + h.gain1 * (d - exp_avg);
  exp_avg_sq = h.beta2 * exp_avg_sq + h.gain2 * d * d;
  C v = exp_avg_sq;
  if (AMSGRAD) {
    v = maximum > v ? maximum : v;
    maximum = v;
  }
  C step = h.size * exp_avg / (square_root(v) / h.root + h.eps);
  return advance(theta, h.size == C(0) ? C(0) : step);
}

}  // namespace gam
