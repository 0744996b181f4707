// The walk over the flat vector, written once: a block takes a chunk, its warps take the tiles of the chunk's tensors
// in turn, a lane takes 16 bytes of every operand at a time.
//
// Which element goes to which thread follows from positions alone, so sums have the same bits in every run.
#pragma once

#include "../math/constants.h"
#include "../math/numbers.h"
#include "operands.h"

namespace gam {

// All chunks of a list (at most 1,024) shall be resident at once on 132 multiprocessors, or the last ones would run
// alone: 8 blocks of 128 threads each, and so at most 64 registers.
constexpr int THREADS = 128, RESIDENT = 8;
constexpr int WARP = 32, WARPS = THREADS / WARP;

template <class S>
constexpr int VECTOR = 16 / int(sizeof(S));  // elements of 16 bytes

// ---------------------------------------------------------------------------------------------------------------------
// Tables.

// The address of a tensor, 0 where it is missing.
__device__ __forceinline__ int64_t address(const List& list, const int64_t* words, int tensor) {
  if (list.table) return list.table[tensor];
  return list.word < 0 ? 0 : words[list.word + tensor];
}

struct Map {
  const int64_t* numbers;
  int32_t tensors;

  __device__ Map(const Layout& layout, const int64_t* words)
      : numbers(layout.map ? layout.map : words + layout.word), tensors(layout.tensors) {}
  __device__ int64_t start(int tensor) const { return numbers[tensor]; }
  __device__ int64_t group(int tensor) const { return numbers[tensors + 1 + tensor]; }
  __device__ bool counted(int tensor) const { return numbers[2 * (tensors + 1) + tensor] != 0; }
  __device__ int64_t first_tensor(int chunk) const { return numbers[3 * (tensors + 1) + chunk]; }
};

// The part of one tensor inside a chunk. Positions inside it are counted from `origin`, an element of the tensor that
// is a multiple of a vector, so that they fit into 32 bits whatever the size of the tensor.
struct Span {
  int tensor;
  int64_t origin;
  int begin, end;  // its elements, after `origin`
};

// visit(span) for every part of a tensor inside this block's chunk, in order; every thread visits all of them.
template <class S, class Visit>
__device__ __forceinline__ void for_each_span(const Layout& layout, const Map& map, Visit visit) {
  const int64_t first = int64_t(blockIdx.x) * layout.chunk, rest = map.start(layout.tensors) - first;
  const int last = int(rest < layout.chunk ? rest : layout.chunk);
  int tensor = int(map.first_tensor(blockIdx.x));
  for (int position = 0; position < last; ++tensor) {
    const int64_t next = map.start(tensor + 1) - first;
    const int stop = int(next < last ? next : last);
    if (stop > position) {
      const int64_t begin = first + position - map.start(tensor);
      const int lead = int(begin % VECTOR<S>);
      visit(Span{tensor, begin - lead, lead, lead + stop - position});
      position = stop;
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Tiles.

// A lane takes STEPS times WIDTH neighbouring elements at once: more loads in flight.
template <int WIDTH, int STEPS>
constexpr int TILE = WARP * WIDTH * STEPS;

// visit(element, whole) for the tiles of a span that are this warp's turn: the lane's first element, and whether the
// tile lies wholly inside the span. `turn` passes on whose turn is next.
template <int WIDTH, int STEPS, class Visit>
__device__ __forceinline__ void for_each_tile(const Span& span, int& turn, Visit visit) {
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  const int own = (warp - turn) & (WARPS - 1);
  for (int first = own * TILE<WIDTH, STEPS>; first < span.end; first += WARPS * TILE<WIDTH, STEPS>)
    visit(first + lane * WIDTH, first >= span.begin && first + TILE<WIDTH, STEPS> <= span.end);
  turn = (turn + (span.end + TILE<WIDTH, STEPS> - 1) / TILE<WIDTH, STEPS>)&(WARPS - 1);
}

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
// shared memory and read anew at each use, since registers are for elements.
template <class T>
struct Part {
  const volatile int64_t* slot;
  __device__ __forceinline__ T* data() const { return reinterpret_cast<T*>(*slot); }
  __device__ explicit operator bool() const { return *slot != 0; }
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

  template <class T>
  __device__ __forceinline__ Part<T> part(const List& list) {
    const int64_t tensor = address(list, words, span.tensor);
    return keep<T>(tensor ? tensor + span.origin * int64_t(sizeof(T)) : 0);
  }

  // The tensor of the first list that has it.
  template <class T>
  __device__ __forceinline__ Part<T> part(const List& list, const List& otherwise) {
    return address(list, words, span.tensor) ? part<T>(list) : part<T>(otherwise);
  }

  // Ends it. Whether all operands that are there allow 16-byte accesses.
  __device__ __forceinline__ bool aligned() const {
    __syncwarp();
    return (all & 15) == 0;
  }

 private:
  template <class T>
  __device__ __forceinline__ Part<T> keep(int64_t value) {
    if (threadIdx.x % WARP == 0) *slot = value;
    all |= value;
    return {slot++};
  }
};

// What a pack is moved in: 16 bytes at a time, or 8, or a single element.
template <int BYTES>
struct Quantum {
  using type = uint4;
};
template <>
struct Quantum<8> {
  using type = uint2;
};

// A missing tensor reads as zeros. Elements are visited once, so they need no place in L1.
template <class T, int COUNT>
__device__ __forceinline__ void load(Pack<T, COUNT>& pack, const Part<T>& from, int element) {
  const T* data = from.data();
  if constexpr (COUNT == 1) {
    pack.set_raw(0, data ? data[element] : T{});
  } else {
    using Q = typename Quantum<int(sizeof(pack))>::type;
    constexpr int QUANTA = int(sizeof(pack) / sizeof(Q));
    Q quanta[QUANTA];
    const Q* source = reinterpret_cast<const Q*>(data + element);
#pragma unroll
    for (int q = 0; q < QUANTA; ++q) quanta[q] = data ? __ldcg(source + q) : Q{};
    memcpy(&pack, quanta, sizeof(pack));
  }
}

template <class T, int COUNT>
__device__ __forceinline__ void store(const Pack<T, COUNT>& pack, const Part<T>& to, int element) {
  if constexpr (COUNT == 1) {
    to.data()[element] = pack.raw(0);
  } else {
    using Q = typename Quantum<int(sizeof(pack))>::type;
    constexpr int QUANTA = int(sizeof(pack) / sizeof(Q));
    Q quanta[QUANTA];
    memcpy(quanta, &pack, sizeof(pack));
    Q* target = reinterpret_cast<Q*>(to.data() + element);
#pragma unroll
    for (int q = 0; q < QUANTA; ++q) __stcg(target + q, quanta[q]);
  }
}

// body.template tile<COUNT, STEPS>(element) for all of a span's elements that are this lane's: STEPS times COUNT
// elements, WARP * COUNT apart. Whole vectors where addresses are aligned; at a span's ends, and elsewhere, one element
// at a time.
template <int WIDTH, int STEPS, class Body>
__device__ __forceinline__ void for_each_element(const Span& span, int& turn, bool is_aligned, Body& body) {
  for_each_tile<WIDTH, STEPS>(span, turn, [&](int element, bool whole) {
    if (whole && is_aligned) {
      body.template tile<WIDTH, STEPS>(element);
      return;
    }
#pragma unroll 1
    for (int i = 0; i < STEPS * WIDTH; ++i) {
      const int vector = element + i / WIDTH * WARP * WIDTH, own = vector + i % WIDTH;
      if (is_aligned && vector >= span.begin && vector + WIDTH <= span.end) {
        body.template tile<WIDTH, 1>(vector);
        i += WIDTH - 1;
      } else if (own >= span.begin && own < span.end) {
        body.template tile<1, 1>(own);
      }
    }
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// Sums, in double.

// sum + a * b; fused, since double arithmetic is slow on many GPUs.
template <class C>
__device__ __forceinline__ double add_product(double sum, C a, C b) {
  return fma(double(a), double(b), sum);
}

template <int ROWS>
using WarpSums = double[WARPS][ROWS];

// values[row] <- the sum over all threads of the block, in a fixed order.
template <int ROWS>
__device__ __forceinline__ void block_sums(double (&values)[ROWS], WarpSums<ROWS>& shared) {
#pragma unroll
  for (int row = 0; row < ROWS; ++row) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2)
      values[row] += __shfl_xor_sync(0xFFFFFFFFu, values[row], offset);
    if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP][row] = values[row];
  }
  __syncthreads();
#pragma unroll
  for (int row = 0; row < ROWS; ++row) {
    values[row] = shared[0][row];
#pragma unroll
    for (int warp = 1; warp < WARPS; ++warp) values[row] += shared[warp][row];
  }
  __syncthreads();  // `shared` may be used again
}

// total[row] <- the sum of the row's columns: the end of a reduction whose chunks other blocks have summed.
template <int ROWS>
__device__ __forceinline__ void row_totals(const Matrix& partials, double (&total)[ROWS], WarpSums<ROWS>& shared) {
#pragma unroll
  for (int row = 0; row < ROWS; ++row) {
    total[row] = 0.0;
    for (int64_t i = threadIdx.x; i < partials.columns; i += THREADS)
      total[row] += partials.data[row * partials.stride + i];
  }
  block_sums(total, shared);
}

// Writes this chunk's column of every row, and clears the columns that no chunk writes.
template <int ROWS>
__device__ __forceinline__ void put_sums(const Matrix& out, double (&values)[ROWS], WarpSums<ROWS>& shared) {
  block_sums(values, shared);
#pragma unroll
  for (int row = 0; row < ROWS; ++row) {
    double* columns = out.data + row * out.stride;
    if (threadIdx.x == 0) columns[blockIdx.x] = values[row];
    if (blockIdx.x == 0)
      for (int64_t i = gridDim.x + threadIdx.x; i < out.columns; i += THREADS) columns[i] = 0.0;
  }
}

}  // namespace gam
