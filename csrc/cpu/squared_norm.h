// Kernel `squared_norm`: sums of ((x - y) * weight)^2.
#pragma once

#include "sums.h"

namespace gam {
namespace {

template <class S>
double squared_norm_of(const SquaredNorm& v, const Span& tile) {
  using C = Compute<S>;
  alignas(64) C buffers[3][TILE];
  const C* x = Tiles<S>::read(v.x, tile, buffers[0]);
  C* value = buffers[0];
  if (has(v.y, tile.tensor)) {
    const C* y = Tiles<S>::read(v.y, tile, buffers[1]);
    if (!v.weight) return sum_of_squared_differences(x, y, tile.count);
    for (int64_t i = 0; i < tile.count; ++i) value[i] = x[i] - y[i];
    x = value;
  }
  if (v.weight) {
    const C* weight = Tiles<S>::read(v.weight, tile, buffers[2]);
    GAM_INDEPENDENT
    for (int64_t i = 0; i < tile.count; ++i) value[i] = times(x[i], weight[i]);
    x = value;
  }
  return sum_of_squares(x, tile.count);
}

template <class S>
void squared_norm(const SquaredNorm& v, ParallelFor parallel_for) {
  clear_unused(v.partials, v.layout);
  for_each_chunk(v.layout, parallel_for, [&](int64_t chunk) {
    double sums[2] = {};
    for_each_span(v.layout, chunk, [&](const Span& span) {
      if (!has(v.x, span.tensor) && !has(v.y, span.tensor)) return;
      double& sum = sums[v.layout.counted[span.tensor] ? 0 : 1];
      for_each_tile(span, [&](const Span& tile) { sum += squared_norm_of<S>(v, tile); });
    });
    for (int row = 0; row < 2; ++row) put(v.partials, row, chunk, sums[row]);
  });
}

}  // namespace
}  // namespace gam
