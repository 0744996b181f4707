// The skip decision: a step of which a gradient was not finite moves nothing and is counted.
#pragma once

#include "constants.h"
#include "projection.h"

namespace gam {

template <int ROWS>
GAM_HOST_DEVICE bool all_finite(const double (&total)[ROWS]) {
  bool finite = true;
  GAM_UNROLL
  for (int row = 0; row < ROWS; ++row) finite = finite && is_finite(total[row]);
  return finite;
}

// Whether an ascent stays at its base: its reduction is `bad`, or that of an ascent before it in this step was.
GAM_HOST_DEVICE bool stays(bool bad, int ascent, const double* control) {
  return bad || (ascent > 0 && control[Control::FOUND_INF] != 0.0);
}

// What the ascent tells those after it; the first one forgets the step before.
GAM_HOST_DEVICE void note_found_inf(bool bad, int ascent, double* control) {
  if (bad || ascent == 0) control[Control::FOUND_INF] = bad;
}

// What a step's end knows before it visits elements: whether to skip, and the scalars of d.
struct Close {
  bool skip;
  DirectionScale scale;
};

// `total`: sums of the rows of the last reduction.
template <int ROWS>
GAM_HOST_DEVICE Close close_of(const double (&total)[ROWS], const double* control, const double* coefficients) {
  return {control[Control::FOUND_INF] != 0.0 || !all_finite(total),
          direction_scale(total, ROWS, coefficients, control)};
}

GAM_HOST_DEVICE void count_step(bool skip, double* control) {
  control[Control::LAST_SKIPPED] = skip;
  control[Control::SKIPPED] += skip;
  control[Control::NOISE_STEP] += 1.0;
}

}  // namespace gam
