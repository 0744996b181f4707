// Kernel `squared_norm`: sums of ((x - y) * weight)^2.
#pragma once

#include "packs.cuh"
#include "sums.cuh"

namespace gam {

struct NormLists {
  enum : unsigned { Y = 1, WEIGHT = 2, ALL = 3 };
  static unsigned of(const SquaredNorm& v) { return Y * is_used(v.y) | WEIGHT * is_used(v.weight); }
};

template <class S, bool HAS_Y, bool HAS_WEIGHT>
struct SquaredNormSpan {
  using C = Compute<S>;
  Part<S> x;
  Part<S, HAS_Y> y;
  Part<S, HAS_WEIGHT> weight;
  double sum;

  template <int COUNT, int STEPS>
  __device__ __forceinline__ void tile(int element, int end, bool aligned) {
    Pack<S, COUNT> a[STEPS], b[STEPS], w[STEPS];
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
      const int e = element + s * WARP * COUNT;
      load(a[s], x, e, end, aligned);
      load(b[s], y, e, end, aligned);
      load(w[s], weight, e, end, aligned);
    }
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
      C values[COUNT];
#pragma unroll
      for (int i = 0; i < COUNT; ++i) {
        values[i] = a[s].get(i) - b[s].get(i);
        if (weight) values[i] = times(values[i], w[s].get(i));
      }
      sum = add_products<S>(sum, values, values);
    }
  }
};

template <class S, unsigned LISTS>
__device__ __forceinline__ void squared_norm(const SquaredNorm& v, const int64_t* words) {
  constexpr bool HAS_Y = (LISTS & NormLists::Y) != 0, HAS_WEIGHT = (LISTS & NormLists::WEIGHT) != 0;
  constexpr int STEPS = HAS_WEIGHT ? 1 : HAS_Y ? 2 : 4;  // 2 KB of loads in flight for a warp
  __shared__ Slots<3> slots;
  const Map map(v.layout, words);
  const int chunk = chunk_forwards();
  double sums[2] = {};
  int turn = 0;
  for_each_span<S>(v.layout, map, chunk, [&](const Span& span) {
    Fetch fetch(slots, words, span);
    SquaredNormSpan<S, HAS_Y, HAS_WEIGHT> body;
    body.x = fetch.part<S>(v.x);
    body.y = fetch.part<S, HAS_Y>(v.y);
    body.weight = fetch.part<S, HAS_WEIGHT>(v.weight);
    body.sum = 0.0;
    for_each_element<VECTOR<S>, STEPS>(span, turn, fetch.aligned(), body);
    const bool counted = map.counted(span.tensor);
    sums[0] += counted ? body.sum : 0.0;
    sums[1] += counted ? 0.0 : body.sum;
  });
  finish_sums(v.partials, sums, chunk, v.layout);
}

}  // namespace gam
