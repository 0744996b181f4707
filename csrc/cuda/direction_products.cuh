// Kernel `direction_products`: h+ h+, h- h+ and h- h- of Algorithm 2, or d^2 for clipping.
#pragma once

#include "../math/direction.h"
#include "multi_tensor.cuh"

namespace gam {

template <class S, bool THREE>
struct DirectionProductsSpan {
  using C = Compute<S>;
  Span span;
  Part<S> g1, last;
  Part<C> folded;
  Direction<C> k;
  double sums[THREE ? 3 : 1];

  template <int COUNT, int STEPS>
  __device__ __forceinline__ void tile(int element) {
    Pack<S, COUNT> a[STEPS], b[STEPS];
    Pack<C, COUNT> c[STEPS];
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
      const int e = element + s * WARP * COUNT;
      if (THREE) load(a[s], g1, e);
      load(b[s], last, e);
      load(c[s], folded, e);
    }
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
#pragma unroll
      for (int i = 0; i < COUNT; ++i) {
        const C minus = c[s].get(i);
        if constexpr (THREE) {
          const C plus = h_plus(k, a[s].get(i), b[s].get(i));
          sums[0] = add_product(sums[0], plus, plus);
          sums[1] = add_product(sums[1], minus, plus);
          sums[2] = add_product(sums[2], minus, minus);
        } else {
          const C d = direction(k, C(0), b[s].get(i), minus);
          sums[0] = add_product(sums[0], d, d);
        }
      }
    }
  }
};

template <class S, bool THREE>
__device__ __forceinline__ void direction_products(const DirectionProducts& v, const int64_t* words) {
  using C = Compute<S>;
  constexpr int STEPS = sizeof(S) == 4 ? 2 : 1, PRODUCTS = THREE ? 3 : 1;
  __shared__ WarpSums<2 * PRODUCTS> shared;
  __shared__ Slots<3> slots;
  const Map map(v.layout, words);
  double sums[2 * PRODUCTS] = {};
  int turn = 0;
  for_each_span<S>(v.layout, map, [&](const Span& span) {
    const double* row = v.coefficients + map.group(span.tensor) * COLUMNS;
    // With g1 the projection is not known yet: h+ stands alone, h- is folded. Without, d is complete.
    Fetch fetch(slots, words, span);
    DirectionProductsSpan<S, THREE> body{
        span, fetch.part<S>(v.g1), fetch.part<S>(v.last), fetch.part<C>(v.folded), direction_of<C>(row, {1.0, 1.0}),
        {}};
    for_each_element<VECTOR<S>, STEPS>(span, turn, fetch.aligned(), body);
    const bool counted = map.counted(span.tensor);
#pragma unroll
    for (int j = 0; j < PRODUCTS; ++j) {
      sums[2 * j] += counted ? body.sums[j] : 0.0;
      sums[2 * j + 1] += counted ? 0.0 : body.sums[j];
    }
  });
  put_sums(v.partials, sums, shared);
}

}  // namespace gam
