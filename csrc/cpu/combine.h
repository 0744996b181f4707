// Kernel `combine_`: the direction d, written out for base optimizers that are not fused; and what `combined_update_`
// shares with it: the close of the step and d of a tile.
#pragma once

#include "../math/direction.h"
#include "../math/skip.h"
#include "sums.h"

namespace gam {
namespace {

// Decides, and counts the step in the control block.
inline Close close_step(const Matrix& partials, double* control, const double* coefficients) {
  double total[6] = {};
  row_sums(partials, total);
  const Close close = partials.rows == 6 ? close_of(total, control, coefficients)
                                         : close_of({total[0], total[1]}, control, coefficients);
  count_step(close.skip, control);
  return close;
}

// d of a tile into `d`.
template <class S, class Record>
void direction_tile(const Record& v, const Span& tile, const Direction<Compute<S>>& k, Compute<S>* d) {
  using C = Compute<S>;
  using L = InLoops<S>;
  alignas(64) L buffers[2][TILE];
  const L* last = Tiles<S>::read(v.last, tile, buffers[0]);
  const C* folded = Tiles<C>::read(v.folded, tile, nullptr);
  if (!has(v.g1, tile.tensor)) {
    for (int64_t i = 0; i < tile.count; ++i) d[i] = direction(k, C(0), widen(last[i]), folded[i]);
    return;
  }
  const L* g1 = Tiles<S>::read(v.g1, tile, buffers[1]);
  for (int64_t i = 0; i < tile.count; ++i) d[i] = direction(k, widen(g1[i]), widen(last[i]), folded[i]);
}

template <class S>
double combine_tile(const Combine& v, const Span& tile, const Direction<Compute<S>>& k) {
  alignas(64) Compute<S> d[TILE];
  direction_tile<S>(v, tile, k, d);
  narrow_all(d, tile.count, at<S>(v.out, tile));
  return sum_of_squares(d, tile.count);
}

template <class S>
void combine(const Combine& v, ParallelFor parallel_for) {
  const Close close = close_step(v.partials, v.control, v.coefficients);
  sum_over_chunks<1>(v.layout, parallel_for, v.direction, [&](int64_t chunk, double* squares) {
    for_each_span(v.layout, chunk, [&](const Span& span) {
      if (!has(v.out, span.tensor)) return;
      const double* row = v.coefficients + v.layout.groups[span.tensor] * COLUMNS;
      const auto k = direction_of<Compute<S>>(row, close.scale);
      for_each_tile(span, [&](const Span& tile) { *squares += combine_tile<S>(v, tile, k); });
    });
  });
}

}  // namespace
}  // namespace gam
