// Kernel `direction_products`: h+ h+, h- h+ and h- h- of Algorithm 2, or d^2 for clipping.
#pragma once

#include "../math/direction.h"
#include "packs.cuh"
#include "sums.cuh"

namespace gam {

template <class S, bool THREE>
struct DirectionProductsSpan {
  using C = Compute<S>;
  Part<S, THREE> g1;
  Part<S> last;
  Part<C> folded;
  Direction<C> k;
  double sums[THREE ? 3 : 1];

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
      C plus[COUNT], minus[COUNT];
#pragma unroll
      for (int i = 0; i < COUNT; ++i) {
        minus[i] = c[s].get(i);
        // With g1 the projection is not known yet: h+ stands alone, h- is folded. Without, d is complete.
        plus[i] = THREE ? h_plus(k, a[s].get(i), b[s].get(i)) : direction(k, C(0), b[s].get(i), minus[i]);
      }
      sums[0] = add_products<S>(sums[0], plus, plus);
      if constexpr (THREE) {
        sums[1] = add_products<S>(sums[1], minus, plus);
        sums[2] = add_products<S>(sums[2], minus, minus);
      }
    }
  }
};

template <class S, bool THREE>
__device__ __forceinline__ void direction_products(const DirectionProducts& v, const int64_t* words) {
  using C = Compute<S>;
  constexpr int STEPS = sizeof(S) == 4 ? 2 : 1, PRODUCTS = THREE ? 3 : 1;
  __shared__ Slots<3> slots;
  const Map map(v.layout, words);
  const int chunk = chunk_forwards();
  double sums[2 * PRODUCTS] = {};
  int turn = 0;
  for_each_span<S>(v.layout, map, chunk, [&](const Span& span) {
    const double* row = v.coefficients + map.group(span.tensor) * COLUMNS;
    Fetch fetch(slots, words, span);
    DirectionProductsSpan<S, THREE> body{fetch.part<S, THREE>(v.g1),
                                         fetch.part<S>(v.last),
                                         fetch.part<C>(v.folded),
                                         direction_of<C>(row, {1.0, 1.0}),
                                         {}};
    for_each_element<VECTOR<S>, STEPS>(span, turn, fetch.aligned(), body);
    const bool counted = map.counted(span.tensor);
#pragma unroll
    for (int j = 0; j < PRODUCTS; ++j) {
      sums[2 * j] += counted ? body.sums[j] : 0.0;
      sums[2 * j + 1] += counted ? 0.0 : body.sums[j];
    }
  });
  finish_sums(v.partials, sums, chunk, v.layout);
}

}  // namespace gam
