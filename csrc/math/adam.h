// torch.optim.Adam's and AdamW's update, in their order of operations.
#pragma once

#include "constants.h"
#include "update.h"

namespace gam {

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
