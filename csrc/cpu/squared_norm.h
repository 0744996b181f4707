// Kernel `squared_norm`: sums of ((x - y) * weight)^2.
#pragma once

#include "sums.h"

namespace gam {
namespace {

template <class S>
double squared_norm_of(const SquaredNorm& v, const Span& tile) {
  using C = Compute<S>;
  using L = InLoops<S>;
  if (!v.weight) {
    using R = InSums<S>;
    alignas(64) R buffers[2][TILE];
    const R* x = Tiles<S, R>::read(v.x, tile, buffers[0]);
    if (!has(v.y, tile.tensor)) return sum_of_squares(x, tile.count);
    return sum_of_squared_differences(x, Tiles<S, R>::read(v.y, tile, buffers[1]), tile.count);
  }
  alignas(64) L buffers[3][TILE];
  alignas(64) C value[TILE];
  const L* x = Tiles<S>::read(v.x, tile, buffers[0]);
  const L* y = Tiles<S>::read(v.y, tile, buffers[1]);
  const L* weight = Tiles<S>::read(v.weight, tile, buffers[2]);
  for (int64_t i = 0; i < tile.count; ++i) value[i] = times(widen(x[i]) - widen(y[i]), widen(weight[i]));
  return sum_of_squares(value, tile.count);
}

template <class S>
void squared_norm(const SquaredNorm& v, ParallelFor parallel_for) {
  sum_over_chunks<2>(v.layout, parallel_for, v.partials, [&](int64_t chunk, double* sums) {
    for_each_span(v.layout, chunk, [&](const Span& span) {
      if (!has(v.x, span.tensor) && !has(v.y, span.tensor)) return;
      double& sum = sums[v.layout.counted[span.tensor] ? 0 : 1];
      for_each_tile(span, [&](const Span& tile) { sum += squared_norm_of<S>(v, tile); });
    });
  });
}

}  // namespace
}  // namespace gam
