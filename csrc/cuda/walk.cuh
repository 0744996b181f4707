// The walk over the flat vector, written once: a block takes a chunk, its warps take the tiles of the chunk's tensors
// in turn, a lane takes 16 bytes of every operand at a time.
//
// Which element goes to which thread follows from positions alone, so sums have the same bits in every run.
#pragma once

#include "../math/constants.h"
#include "../math/numbers.h"
#include "operands.h"

namespace gam {

// 8 blocks of 128 threads each are resident on a multiprocessor, and so a thread takes at most 64 registers.
constexpr int THREADS = 128, RESIDENT = 8;
constexpr int WARP = 32, WARPS = THREADS / WARP;

template <class S>
constexpr int VECTOR = 16 / int(sizeof(S));  // elements of 16 bytes

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

// A kernel that reads what the one before it has read takes the chunks in the opposite order: the last ones are still
// in the cache.
__device__ __forceinline__ int chunk_forwards() { return int(blockIdx.x); }
__device__ __forceinline__ int chunk_backwards() { return int(gridDim.x - 1 - blockIdx.x); }

// The part of one tensor inside a chunk. Positions inside it are counted from `origin`, an element of the tensor that
// is a multiple of a vector, so that they fit into 32 bits whatever the size of the tensor.
struct Span {
  int tensor;
  int64_t origin;
  int begin, end;   // its elements, after `origin`
  bool head, tail;  // whether less than a vector of the tensor lies before it, or behind it
};

// visit(span) for every part of a tensor inside this block's chunk, in order; every thread visits all of them.
template <class S, class Visit>
__device__ __forceinline__ void for_each_span(const Layout& layout, const Map& map, int chunk, Visit visit) {
  const int64_t first = int64_t(chunk) * layout.chunk, rest = map.start(layout.tensors) - first;
  const int last = int(rest < layout.chunk ? rest : layout.chunk);
  int tensor = int(map.first_tensor(chunk));
  for (int position = 0; position < last; ++tensor) {
    const int64_t next = map.start(tensor + 1) - first;
    const int stop = int(next < last ? next : last);
    if (stop > position) {
      const int64_t begin = first + position - map.start(tensor);
      const int lead = int(begin % VECTOR<S>);
      visit(Span{tensor, begin - lead, lead, lead + stop - position, begin == 0, next - stop < VECTOR<S>});
      position = stop;
    }
  }
}

// A lane takes STEPS times WIDTH neighbouring elements at once: more loads in flight.
template <int WIDTH, int STEPS>
constexpr int TILE = WARP * WIDTH * STEPS;

// Calls, for all of a span's elements that are this lane's,
//     body.template tile<WIDTH, STEPS>(element, end, aligned): STEPS times WIDTH elements, WARP * WIDTH apart; those
//         from `end` on are not the span's, and are neither read nor written;
//     body.template tile<1, 1>(element, element + 1, true): at the ends of a span.
// `aligned`: whether addresses of whole vectors are. The first and the last vector of a tensor are taken one by one, so
// that 16 bytes around any other lie inside it. `turn` passes on which warp is next.
template <int WIDTH, int STEPS, class Body>
__device__ __forceinline__ void for_each_element(const Span& span, int& turn, bool aligned, Body& body) {
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  int first = (span.begin + WIDTH - 1) / WIDTH * WIDTH + (span.head ? WIDTH : 0);
  int last = span.end / WIDTH * WIDTH - (span.tail ? WIDTH : 0);
  if (first >= last) first = last = span.end;
  const int tiles = (last - first + TILE<WIDTH, STEPS> - 1) / TILE<WIDTH, STEPS>;
  const int begin = first + lane * WIDTH;
  if (aligned) {
    for (int i = (warp - turn) & (WARPS - 1); i < tiles; i += WARPS)
      body.template tile<WIDTH, STEPS>(begin + i * TILE<WIDTH, STEPS>, last, true);
  } else {
    for (int i = (warp - turn) & (WARPS - 1); i < tiles; i += WARPS)
#pragma unroll 1
      for (int s = 0; s < STEPS; ++s)
        body.template tile<WIDTH, 1>(begin + i * TILE<WIDTH, STEPS> + s * WARP * WIDTH, last, false);
  }
  turn += tiles;
  if (((warp - turn) & (WARPS - 1)) == 0) {
    const int heads = first - span.begin, ends = heads + span.end - last;
#pragma unroll 1
    for (int i = lane; i < ends; i += WARP) {
      const int element = i < heads ? span.begin + i : last + i - heads;
      body.template tile<1, 1>(element, element + 1, true);
    }
  }
  turn = (turn + 1) & (WARPS - 1);
}

}  // namespace gam
