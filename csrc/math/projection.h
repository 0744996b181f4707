// What is known of the direction before elements are visited: Algorithm 2's projection of h- on h+, or the bound on the
// flatness term; and the clipping of d.
#pragma once

#include "constants.h"
#include "numbers.h"

namespace gam {

// plus_scale, the weight of h+ in d, and the factor that undoes the loss scale and clips |d|.
struct DirectionScale {
  double plus_scale, unscale;
};

// Algorithm 2: 1 - minus s takes the projection of h- on h+ out of minus h-; s = <h-, h+> / |h+|^2.
GAM_HOST_DEVICE double projecting_scale(double minus, double plus_plus, double minus_plus) {
  return 1.0 - minus * (plus_plus > 0.0 ? minus_plus / plus_plus : 0.0);
}

// alpha' = min(alpha, max_ratio |h_loss| / (|h_norm| + xi)), with h- = h_loss and h+ = h_norm. alpha may be infinite;
// the result is a number that float can hold.
GAM_HOST_DEVICE double bounded_scale(const double* row, double plus_plus, double minus_minus, double loss_scale,
                                     double xi) {
  constexpr double BOUND = 1e30;
  double norm = sqrt(plus_plus) / loss_scale + xi;
  double bound = norm > 0.0 ? row[Column::MAX_RATIO] * (sqrt(minus_minus) / loss_scale) / norm : BOUND;
  double alpha = row[Column::ALPHA] < bound ? row[Column::ALPHA] : bound;
  return alpha < BOUND ? alpha : BOUND;
}

// `total`: sums over counted and over other tensors of h+ h+, h- h+ and h- h- (rows = 6), or of d^2 (rows = 2). `row`:
// of the coefficient table, the first.
GAM_HOST_DEVICE DirectionScale direction_scale(const double* total, int rows, const double* row,
                                               const double* control) {
  double loss_scale = control[Control::LOSS_SCALE], max_norm = control[Control::MAX_NORM];
  double minus = row[Column::DIRECTION_FOLDED];
  double plus_scale = 1.0, squared = total[0] + total[1];
  if (rows == 6) {
    plus_scale = row[Column::MAX_RATIO] > 0.0
                     ? bounded_scale(row, total[0], total[4], loss_scale, control[Control::EPS])
                     : projecting_scale(minus, total[0], total[2]);
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

}  // namespace gam
