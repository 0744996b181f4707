// What the updates of all base optimizers have in common.
#pragma once

#include "numbers.h"

namespace gam {

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

}  // namespace gam
