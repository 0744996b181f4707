// Kernel `combine_`: the direction d, written out for base optimizers that are not fused; and what `combined_update_`
// shares with it: the close of the step.
#pragma once

#include "../math/direction.h"
#include "../math/skip.h"
#include "packs.cuh"
#include "sums.cuh"

namespace gam {

template <int ROWS>
__device__ __forceinline__ Close close_of_rows(const Matrix& partials, const double* control,
                                               const double* coefficients) {
  double total[ROWS];
  row_totals(partials, total);
  return close_of(total, control, coefficients);
}

// Every block decides alike; one counts the step in slots that no block reads.
__device__ __forceinline__ Close close_step(const Matrix& partials, double* control, const double* coefficients) {
  const Close close = partials.rows == 6 ? close_of_rows<6>(partials, control, coefficients)
                                         : close_of_rows<2>(partials, control, coefficients);
  if (blockIdx.x == 0 && threadIdx.x == 0) count_step(close.skip, control);
  return close;
}

template <class S>
struct CombineSpan {
  using C = Compute<S>;
  Part<S> out, g1, last;
  Part<C> folded;
  Direction<C> k;
  double squares;

  template <int COUNT, int STEPS>
  __device__ __forceinline__ void tile(int element, int end, bool aligned) {
    Pack<S, COUNT> a[STEPS], b[STEPS];
    Pack<C, COUNT> c[STEPS];
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
      const int e = element + s * WARP * COUNT;
      load(a[s], g1, e, end, aligned);
      load(b[s], last, e, end, aligned);
      load(c[s], folded, e, end, aligned);
    }
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
      C d[COUNT];
#pragma unroll
      for (int i = 0; i < COUNT; ++i) {
        d[i] = direction(k, a[s].get(i), b[s].get(i), c[s].get(i));
        a[s].set(i, d[i]);
      }
      squares = add_products<S>(squares, d, d);
      store(a[s], out, element + s * WARP * COUNT, end, aligned);
    }
  }
};

template <class S>
__device__ __forceinline__ void combine(const Combine& v, const int64_t* words) {
  using C = Compute<S>;
  constexpr int STEPS = 2;
  __shared__ Slots<4> slots;
  const Close close = close_step(v.partials, v.control, v.coefficients);
  const Map map(v.layout, words);
  const int chunk = chunk_backwards();
  double squares[1] = {};
  int turn = 0;
  for_each_span<S>(v.layout, map, chunk, [&](const Span& span) {
    if (!address(v.out, words, span.tensor)) return;
    Fetch fetch(slots, words, span);
    CombineSpan<S> body{fetch.part<S>(v.out),
                        fetch.part<S>(v.g1),
                        fetch.part<S>(v.last),
                        fetch.part<C>(v.folded),
                        direction_of<C>(v.coefficients + map.group(span.tensor) * COLUMNS, close.scale),
                        0.0};
    for_each_element<VECTOR<S>, STEPS>(span, turn, fetch.aligned(), body);
    squares[0] += body.squares;
  });
  finish_sums(v.direction, squares, chunk, v.layout);
}

}  // namespace gam
