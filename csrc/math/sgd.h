// torch.optim.SGD's update, in its order of operations.
#pragma once

#include "constants.h"
#include "update.h"

namespace gam {

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

}  // namespace gam
