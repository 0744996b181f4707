// Kernel `direction_products`: h+ h+, h- h+ and h- h- of Algorithm 2, or d^2 for clipping.
#pragma once

#include "../math/direction.h"
#include "sums.h"

namespace gam {
namespace {

template <class S>
void add_direction_products(const DirectionProducts& v, const Span& tile, double* sums) {
  using C = Compute<S>;
  using L = InLoops<S>;
  alignas(64) L buffers[2][TILE];
  alignas(64) C value[TILE];
  const double* row = v.coefficients + v.layout.groups[tile.tensor] * COLUMNS;
  const L* last = Tiles<S>::read(v.last, tile, buffers[0]);
  const C* minus = Tiles<C>::read(v.folded, tile, nullptr);
  // With g1 the projection is not known yet: h+ stands alone, h- is folded. Without, d is complete.
  const Direction<C> k = direction_of<C>(row, {1.0, 1.0});
  if (!v.g1) {
    for (int64_t i = 0; i < tile.count; ++i) value[i] = direction(k, C(0), widen(last[i]), minus[i]);
    sums[0] += sum_of_squares(value, tile.count);
    return;
  }
  const L* g1 = Tiles<S>::read(v.g1, tile, buffers[1]);
  for (int64_t i = 0; i < tile.count; ++i) value[i] = h_plus(k, widen(g1[i]), widen(last[i]));
  add_three_products(value, minus, tile.count, sums);
}

template <class S, int ROWS>
void direction_products_in(const DirectionProducts& v, ParallelFor parallel_for) {
  sum_over_chunks<ROWS>(v.layout, parallel_for, v.partials, [&](int64_t chunk, double* sums) {
    for_each_span(v.layout, chunk, [&](const Span& span) {
      if (!has(v.g1, span.tensor) && !has(v.last, span.tensor) && !has(v.folded, span.tensor)) return;
      double* first = sums + (v.layout.counted[span.tensor] ? 0 : 1);
      for_each_tile(span, [&](const Span& tile) { add_direction_products<S>(v, tile, first); });
    });
  });
}

template <class S>
void direction_products(const DirectionProducts& v, ParallelFor parallel_for) {
  v.g1 ? direction_products_in<S, 6>(v, parallel_for) : direction_products_in<S, 2>(v, parallel_for);
}

}  // namespace
}  // namespace gam
