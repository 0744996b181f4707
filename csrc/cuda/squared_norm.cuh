// Kernel `squared_norm`: sums of ((x - y) * weight)^2.
#pragma once

#include "multi_tensor.cuh"

namespace gam {

template <class S>
struct SquaredNormSpan {
  using C = Compute<S>;
  Span span;
  Part<S> x, y, weight;
  double sum;

  template <int COUNT, int STEPS>
  __device__ __forceinline__ void tile(int element) {
    Pack<S, COUNT> a[STEPS], b[STEPS], w[STEPS];
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
      const int e = element + s * WARP * COUNT;
      load(a[s], x, e);
      load(b[s], y, e);
      if (weight) load(w[s], weight, e);
    }
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
#pragma unroll
      for (int i = 0; i < COUNT; ++i) {
        C value = a[s].get(i) - b[s].get(i);
        if (weight) value = times(value, w[s].get(i));
        sum = add_product(sum, value, value);
      }
    }
  }
};

template <class S>
__device__ __forceinline__ void squared_norm(const SquaredNorm& v, const int64_t* words) {
  constexpr int STEPS = 2;
  __shared__ WarpSums<2> shared;
  __shared__ Slots<3> slots;
  const Map map(v.layout, words);
  double sums[2] = {};
  int turn = 0;
  for_each_span<S>(v.layout, map, [&](const Span& span) {
    Fetch fetch(slots, words, span);
    SquaredNormSpan<S> body{span, fetch.part<S>(v.x), fetch.part<S>(v.y), fetch.part<S>(v.weight), 0.0};
    for_each_element<VECTOR<S>, STEPS>(span, turn, fetch.aligned(), body);
    sums[0] += map.counted(span.tensor) ? body.sum : 0.0;
    sums[1] += map.counted(span.tensor) ? 0.0 : body.sum;
  });
  put_sums(v.partials, sums, shared);
}

}  // namespace gam
