// Kernel `restore_`: theta <- backup, bit for bit.
#pragma once

#include "packs.cuh"

namespace gam {

template <class S>
struct RestoreSpan {
  Part<S> theta, backup;

  template <int COUNT, int STEPS>
  __device__ __forceinline__ void tile(int element, int end, bool aligned) {
    Pack<S, COUNT> kept[STEPS];
#pragma unroll
    for (int s = 0; s < STEPS; ++s) load(kept[s], backup, element + s * WARP * COUNT, end, aligned);
#pragma unroll
    for (int s = 0; s < STEPS; ++s) store(kept[s], theta, element + s * WARP * COUNT, end, aligned);
  }
};

template <class S>
__device__ __forceinline__ void restore(const Restore& v, const int64_t* words) {
  constexpr int STEPS = 4;
  __shared__ Slots<2> slots;
  const Map map(v.layout, words);
  int turn = 0;
  for_each_span<S>(v.layout, map, chunk_forwards(), [&](const Span& span) {
    Fetch fetch(slots, words, span);
    RestoreSpan<S> body{fetch.part<S>(v.theta), fetch.part<S>(v.backup)};
    for_each_element<VECTOR<S>, STEPS>(span, turn, fetch.aligned(), body);
  });
}

}  // namespace gam
