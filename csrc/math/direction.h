// The direction d: h_loss + alpha h_norm (Algorithm 1, line 10), or Algorithm 2's h+ - gamma (h- minus its projection).
#pragma once

#include "constants.h"
#include "projection.h"

namespace gam {

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

}  // namespace gam
