// Kernel `combined_update_`: the direction d, theta from its backup, and the base optimizer's update, in one pass.
#pragma once

#include "../math/adam.h"
#include "../math/sgd.h"
#include "combine.h"
#include "restore.h"

namespace gam {
namespace {

// A tile being updated: d, and the tensors that the update reads and writes.
template <class S>
struct Updated {
  using C = Compute<S>;
  using L = InLoops<S>;
  alignas(64) C d[TILE];
  alignas(64) L buffers[4][TILE];
  const L* old;
  L* theta;
  bool stream;

  Updated(const CombinedUpdate& v, const Span& tile) {
    stream = v.backup && streams<S>(v.layout);
    old = Tiles<S>::read(v.backup ? v.backup : v.theta, tile, buffers[0]);
    theta = Tiles<S>::target(at<S>(v.theta, tile), buffers[0], stream);
  }

  // A state tensor, to be changed in place and then written.
  L* state(AddressRow list, const Span& tile, int buffer) {
    return const_cast<L*>(Tiles<S>::read(list, tile, buffers[buffer]));
  }
};

// What is the same for all elements is decided before the loop; compilers do not always move it there.
template <class S, bool FIRST, bool NESTEROV>
void momentum_tile(const CombinedUpdate& v, const Span& tile, Sgd<Compute<S>> h, Updated<S>& t) {
  using C = Compute<S>;
  using L = InLoops<S>;
  h.first = FIRST;
  h.nesterov = NESTEROV;
  const C* d = t.d;
  const L* old = t.old;
  L *theta = t.theta, *momentum = t.state(v.state1, tile, 1);
  GAM_INDEPENDENT
  for (int64_t i = 0; i < tile.count; ++i) {
    C moved = widen(momentum[i]);
    narrow(sgd_momentum(h, widen(old[i]), d[i], moved), theta[i]);
    narrow(moved, momentum[i]);
  }
  Tiles<S>::write(at<S>(v.state1, tile), momentum, tile.count);
}

template <class S>
void sgd_tile(const CombinedUpdate& v, const Span& tile, const Sgd<Compute<S>>& h, Updated<S>& t) {
  if (has(v.state1, tile.tensor)) {
    if (h.first)
      h.nesterov ? momentum_tile<S, true, true>(v, tile, h, t) : momentum_tile<S, true, false>(v, tile, h, t);
    else
      h.nesterov ? momentum_tile<S, false, true>(v, tile, h, t) : momentum_tile<S, false, false>(v, tile, h, t);
    return;
  }
  const Compute<S>* d = t.d;
  const InLoops<S>* old = t.old;
  InLoops<S>* theta = t.theta;
  GAM_INDEPENDENT
  for (int64_t i = 0; i < tile.count; ++i) narrow(sgd(h, widen(old[i]), d[i]), theta[i]);
}

template <class S, bool AMSGRAD>
void adam_tile(const CombinedUpdate& v, const Span& tile, const Adam<Compute<S>>& h, Updated<S>& t) {
  using C = Compute<S>;
  using L = InLoops<S>;
  const C* d = t.d;
  const L* old = t.old;
  L *theta = t.theta, *m = t.state(v.state1, tile, 1), *s = t.state(v.state2, tile, 2);
  L* maximum = AMSGRAD ? t.state(v.state3, tile, 3) : nullptr;
  GAM_INDEPENDENT
  for (int64_t i = 0; i < tile.count; ++i) {
    C exp_avg = widen(m[i]), exp_avg_sq = widen(s[i]), largest = AMSGRAD ? widen(maximum[i]) : C(0);
    narrow(adam<AMSGRAD>(h, widen(old[i]), d[i], exp_avg, exp_avg_sq, largest), theta[i]);
    narrow(exp_avg, m[i]);
    narrow(exp_avg_sq, s[i]);
    if (AMSGRAD) narrow(largest, maximum[i]);
  }
  Tiles<S>::write(at<S>(v.state1, tile), m, tile.count);
  Tiles<S>::write(at<S>(v.state2, tile), s, tile.count);
  if (AMSGRAD) Tiles<S>::write(at<S>(v.state3, tile), maximum, tile.count);
}

// The base optimizer's scalars of one tensor. Neighbours mostly share group and step, so they are kept between tensors.
template <class C>
struct Scalars {
  int64_t group = -1;
  float step = -1.0f;
  Direction<C> k;
  Sgd<C> sgd;
  Adam<C> adam;
  bool amsgrad;

  void prepare(const CombinedUpdate& v, int64_t tensor, DirectionScale scale) {
    float next = *reinterpret_cast<const float*>(v.steps[tensor]) + 1.0f;
    if (v.layout.groups[tensor] == group && next == step) return;
    group = v.layout.groups[tensor];
    step = next;
    const double* row = v.coefficients + group * COLUMNS;
    k = direction_of<C>(row, scale);
    if (v.algorithm == Algorithm::SGD) sgd = sgd_of<C>(row, step);
    if (v.algorithm == Algorithm::ADAM) adam = adam_of<C>(row, step);
    amsgrad = (int(row[Column::FLAGS]) & Flag::AMSGRAD) != 0;
  }
};

template <class S>
double update_tile(const CombinedUpdate& v, const Span& tile, const Scalars<Compute<S>>& h) {
  Updated<S> t(v, tile);
  direction_tile<S>(v, tile, h.k, t.d);
  if (v.algorithm == Algorithm::SGD)
    sgd_tile<S>(v, tile, h.sgd, t);
  else if (h.amsgrad)
    adam_tile<S, true>(v, tile, h.adam, t);
  else
    adam_tile<S, false>(v, tile, h.adam, t);
  Tiles<S>::write(at<S>(v.theta, tile), t.theta, tile.count, t.stream);
  return sum_of_squares(t.d, tile.count);
}

inline bool is_updated(const CombinedUpdate& v, int64_t tensor) {
  return has(v.g1, tensor) || has(v.last, tensor) || has(v.folded, tensor);
}

template <class S>
void combined_update(const CombinedUpdate& v, ParallelFor parallel_for) {
  const Close close = close_step(v.partials, v.control, v.coefficients);
  sum_over_chunks<1>(v.layout, parallel_for, v.direction, [&](int64_t chunk, double* squares) {
    Scalars<Compute<S>> scalars;
    for_each_span(v.layout, chunk, [&](const Span& span) {
      if (close.skip || !is_updated(v, span.tensor)) {
        if (v.backup) restore_span<S>(v.theta, v.backup, span, streams<S>(v.layout));
        return;
      }
      scalars.prepare(v, span.tensor, close.scale);
      for_each_tile(span, [&](const Span& tile) { *squares += update_tile<S>(v, tile, scalars); });
    });
  });
  // Only now: chunks of one tensor all read its step.
  for (int64_t i = 0; !close.skip && i < v.layout.tensors; ++i)
    if (is_updated(v, i)) *reinterpret_cast<float*>(v.steps[i]) += 1.0f;
}

}  // namespace
}  // namespace gam
