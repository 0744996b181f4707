// Ascents: lines 6 and 7 of Algorithm 1, with the gradients of appendix D (Zhang et al., CVPR 2023, arXiv 2303.03108).
#pragma once

#include "numbers.h"

namespace gam {

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

}  // namespace gam
