// Reading and writing the elements of a lane: 16 bytes at a time, also where a tensor does not lie on a 16-byte mark.
#pragma once

#include "walk.cuh"

namespace gam {

// The elements of one operand that a lane takes in one step; read and written in compute type.
template <class T, int COUNT, bool HALVES = sizeof(T) == 2 && COUNT != 1>
struct Pack {
  T values[COUNT];

  __device__ __forceinline__ T raw(int i) const { return values[i]; }
  __device__ __forceinline__ void set_raw(int i, T value) { values[i] = value; }
  __device__ __forceinline__ Compute<T> get(int i) const { return widen(values[i]); }
  __device__ __forceinline__ void set(int i, Compute<T> value) { narrow(value, values[i]); }
};

// Two to a word: as elements of their own they would take a register each.
template <class T, int COUNT>
struct Pack<T, COUNT, true> {
  uint32_t words[COUNT / 2];

  __device__ __forceinline__ T raw(int i) const { return {uint16_t(i % 2 ? words[i / 2] >> 16 : words[i / 2])}; }
  __device__ __forceinline__ void set_raw(int i, T value) {
    const uint32_t bits = value.bits;
    words[i / 2] = i % 2 ? (words[i / 2] & 0xFFFFu) | bits << 16 : (words[i / 2] & 0xFFFF0000u) | bits;
  }
  __device__ __forceinline__ float get(int i) const { return widen(raw(i)); }
  __device__ __forceinline__ void set(int i, float value) {
    T narrowed;
    narrow(value, narrowed);
    set_raw(i, narrowed);
  }
};

// A tensor's part inside a span: the address of its element `origin`, 0 where the tensor is missing. It is kept in
// shared memory and read anew at each use, since registers are for elements. USED: whether the kernel is compiled for
// sets of operands that have it.
template <class T, bool USED = true>
struct Part {
  const volatile int64_t* slot;
  __device__ __forceinline__ T* data() const { return reinterpret_cast<T*>(*slot); }
  __device__ explicit operator bool() const { return *slot != 0; }
};

template <class T>
struct Part<T, false> {
  __device__ constexpr explicit operator bool() const { return false; }
};

// The addresses of a span's operands, a row for each warp.
template <int COUNT>
using Slots = int64_t[WARPS][COUNT];

// Fills this warp's row of slots, one operand after the other.
struct Fetch {
  int64_t* slot;
  const int64_t* words;
  const Span& span;
  int64_t all = 0;

  // Between two of these the warp's lanes see the same slots.
  template <int COUNT>
  __device__ Fetch(Slots<COUNT>& slots, const int64_t* table, const Span& of)
      : slot(slots[threadIdx.x / WARP]), words(table), span(of) {
    __syncwarp();
  }

  template <class T, bool USED = true>
  __device__ __forceinline__ Part<T, USED> part(const List& list) {
    if constexpr (USED) {
      const int64_t tensor = address(list, words, span.tensor);
      const int64_t value = tensor ? tensor + span.origin * int64_t(sizeof(T)) : 0;
      if (threadIdx.x % WARP == 0) *slot = value;
      all |= value;
      return {slot++};
    } else {
      return {};
    }
  }

  // Ends it. Whether all operands that are there allow 16-byte accesses.
  __device__ __forceinline__ bool aligned() const {
    __syncwarp();
    return (all & 15) == 0;
  }
};

// What a pack is moved in: 16 bytes at a time, or 8.
template <int BYTES>
struct Quantum {
  using type = uint4;
};
template <>
struct Quantum<8> {
  using type = uint2;
};

template <int BY, int COUNT>
__device__ __forceinline__ void move_down(uint32_t (&words)[COUNT], bool moves) {
#pragma unroll
  for (int w = 0; w + BY < COUNT; ++w) words[w] = moves ? words[w + BY] : words[w];
}

// A pack whose first element lies `shift` bytes after a mark: the marked quanta that hold it, of which the last is the
// next lane's first, with their words moved into place. The warp's lanes come together.
template <class T, int COUNT>
__device__ __forceinline__ void load_shifted(Pack<T, COUNT>& pack, const T* first, int shift, bool there, bool more) {
  using Q = typename Quantum<int(sizeof(pack))>::type;
  constexpr int QUANTA = int(sizeof(pack) / sizeof(Q)), EACH = int(sizeof(Q) / 4), OWN = QUANTA * EACH;
  const Q* marked = reinterpret_cast<const Q*>(reinterpret_cast<const char*>(first) - shift);
  const bool from_next = more && threadIdx.x % WARP != WARP - 1;
  Q quanta[QUANTA + 1] = {};
#pragma unroll
  for (int q = 0; q < QUANTA; ++q)
    if (there) quanta[q] = __ldcg(marked + q);
  if (there && !from_next) quanta[QUANTA] = __ldcg(marked + QUANTA);
  uint32_t words[OWN + EACH];
#pragma unroll
  for (int q = 0; q <= QUANTA; ++q) memcpy(words + q * EACH, quanta + q, sizeof(Q));
#pragma unroll
  for (int w = 0; w < EACH; ++w) {
    const uint32_t next = __shfl_down_sync(0xFFFFFFFFu, words[w], 1);
    words[OWN + w] = from_next ? next : words[OWN + w];
  }
  if (EACH == 4) move_down<2>(words, shift & 8);
  move_down<1>(words, shift & 4);
#pragma unroll
  for (int w = 0; w < OWN; ++w) words[w] = __funnelshift_r(words[w], words[w + 1], shift % 4 * 8);
  Q placed[QUANTA];
#pragma unroll
  for (int q = 0; q < QUANTA; ++q) memcpy(placed + q, words + q * EACH, sizeof(Q));
  memcpy(&pack, placed, sizeof(pack));
}

// The lane's pack from `element` on; zeros where the tensor is missing, and for elements from `end` on. Elements are
// visited once, so they need no place in L1.
template <class T, int COUNT, bool USED>
__device__ __forceinline__ void load(Pack<T, COUNT>& pack, const Part<T, USED>& from, int element, int end,
                                     bool aligned) {
  if constexpr (!USED) {
    pack = {};
  } else if constexpr (COUNT == 1) {
    const T* data = from.data();
    pack.set_raw(0, data ? data[element] : T{});
  } else {
    using Q = typename Quantum<int(sizeof(pack))>::type;
    constexpr int QUANTA = int(sizeof(pack) / sizeof(Q));
    const T* data = from.data();
    const bool there = data && element < end;
    const int shift = int(reinterpret_cast<intptr_t>(data) % int(sizeof(Q)));
    if (!aligned && shift) {
      load_shifted(pack, data + element, shift, there, element + COUNT < end);
      return;
    }
    Q quanta[QUANTA];
    const Q* source = reinterpret_cast<const Q*>(data + element);
#pragma unroll
    for (int q = 0; q < QUANTA; ++q) quanta[q] = there ? __ldcg(source + q) : Q{};
    memcpy(&pack, quanta, sizeof(pack));
  }
}

// The lane's pack of the first of two tensors, if it is there, and else of the second.
template <class T, int COUNT, bool USED>
__device__ __forceinline__ void load(Pack<T, COUNT>& pack, const Part<T, USED>& from, const Part<T>& otherwise,
                                     int element, int end, bool aligned) {
  if constexpr (USED) {
    if (from) {
      load(pack, from, element, end, aligned);
      return;
    }
  }
  load(pack, otherwise, element, end, aligned);
}

// Writes the lane's pack, but for elements from `end` on. KEPT: whether it will be read again before much else is.
template <bool KEPT = true, class T, int COUNT>
__device__ __forceinline__ void store(const Pack<T, COUNT>& pack, const Part<T>& to, int element, int end,
                                      bool aligned) {
  T* target = to.data() + element;
  if constexpr (COUNT == 1) {
    *target = pack.raw(0);
  } else {
    using Q = typename Quantum<int(sizeof(pack))>::type;
    constexpr int QUANTA = int(sizeof(pack) / sizeof(Q));
    if (element >= end) return;
    if (!aligned && reinterpret_cast<intptr_t>(target) % int(sizeof(Q))) {
#pragma unroll
      for (int i = 0; i < COUNT; ++i) target[i] = pack.raw(i);
      return;
    }
    Q quanta[QUANTA];
    memcpy(quanta, &pack, sizeof(pack));
#pragma unroll
    for (int q = 0; q < QUANTA; ++q) {
      if constexpr (KEPT)
        __stcg(reinterpret_cast<Q*>(target) + q, quanta[q]);
      else
        __stcs(reinterpret_cast<Q*>(target) + q, quanta[q]);
    }
  }
}

}  // namespace gam
