// Algorithm 2's projection of h- on h+, and the clipping of d: what is known of the direction before elements are
// visited.
#pragma once

#include "numbers.h"

namespace gam {

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

}  // namespace gam
