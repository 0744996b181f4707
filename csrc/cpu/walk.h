// The walk over the flat vector, written once: chunks in parallel, the tensors inside a chunk, tiles that fit in L1.
//
// A tile is read through `read`: a pointer to the tensor itself where compilers vectorise loops that convert its
// numbers one by one, to a row of zeros where it is missing, and to a widened copy otherwise. So formulas are plain
// loops over arrays, and neither missing operands nor storage types multiply them.
#pragma once

#include "../math/constants.h"
#include "../math/numbers.h"
#include "operands.h"
#include "vectors.h"

namespace gam {
namespace {

constexpr int64_t TILE = 512;       // elements; all operands of a tile fit in L1
constexpr int64_t GRAIN = 1 << 15;  // elements below which a second thread costs more than it brings

// Part of one tensor: `count` elements from `offset` on, `position` in the flat vector.
struct Span {
  int64_t tensor, offset, count, position;
};

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

inline int64_t chunks_of(const Layout& layout) { return chunk_count(layout.starts[layout.tensors], layout.chunk); }

// visit(chunk) for every chunk, in parallel.
template <class Visit>
void for_each_chunk(const Layout& layout, ParallelFor parallel_for, Visit visit) {
  Body body = [](int64_t begin, int64_t end, void* context) {
    for (int64_t chunk = begin; chunk < end; ++chunk) (*static_cast<Visit*>(context))(chunk);
#ifdef GAM_STREAM_LINE
    _mm_sfence();  // writes past the caches come before the word that this thread is done
#endif
  };
  int64_t grain = GRAIN / layout.chunk;
  parallel_for(chunks_of(layout), grain > 0 ? grain : 1, body, &visit);
}

// The tensor that holds element `position`: the last one that starts at or before it.
inline int64_t tensor_at(const Layout& layout, int64_t position) {
  int64_t low = 0, high = layout.tensors;
  while (high - low > 1) {
    int64_t middle = (low + high) / 2;
    (layout.starts[middle] <= position ? low : high) = middle;
  }
  return low;
}

// visit(span) for every part of a tensor inside a chunk, in order.
template <class Visit>
void for_each_span(const Layout& layout, int64_t chunk, Visit visit) {
  int64_t position = chunk * layout.chunk;
  int64_t end = smaller(position + layout.chunk, layout.starts[layout.tensors]);
  for (int64_t i = tensor_at(layout, position); position < end; ++i) {
    int64_t stop = smaller(end, layout.starts[i + 1]);
    if (stop > position) visit(Span{i, position - layout.starts[i], stop - position, position});
    position = stop > position ? stop : position;
  }
}

// visit(tile) for the tiles of a span, in order. No tile crosses a multiple of 2^32, so each has one noise stream.
template <class Visit>
void for_each_tile(const Span& span, Visit visit) {
  for (int64_t done = 0; done < span.count;) {
    int64_t position = span.position + done;
    int64_t count = smaller(smaller(TILE, span.count - done), (int64_t(1) << 32) - (position & 0xFFFFFFFF));
    visit(Span{span.tensor, span.offset + done, count, position});
    done += count;
  }
}

inline bool has(AddressRow list, int64_t tensor) { return list != nullptr && list[tensor] != 0; }

// The tile's first element in a list that has this tensor.
template <class S>
S* at(AddressRow list, const Span& tile) {
  return reinterpret_cast<S*>(list[tile.tensor]) + tile.offset;
}

// Bytes of a list from which on its writes go past the caches: a smaller one may still be there when the next pass
// reads it, a larger one only costs a read of every line before it is overwritten.
constexpr int64_t STREAM_BYTES = int64_t(64) << 20;

template <class S>
inline bool streams(const Layout& layout) {
  return layout.starts[layout.tensors] * int64_t(sizeof(S)) >= STREAM_BYTES;
}

// memcpy past the caches, where the instruction set can. Only whole lines go there: memory takes a part of one at the
// cost of several.
inline void stream_copy(void* to, const void* from, int64_t bytes) {
  char* target = static_cast<char*>(to);
  const char* source = static_cast<const char*>(from);
#ifdef GAM_STREAM_LINE
  int64_t i = smaller(bytes, -reinterpret_cast<intptr_t>(target) & 63);
  memcpy(target, source, i);
  for (; i + 64 <= bytes; i += 64) GAM_STREAM_LINE(target + i, source + i);
  memcpy(target + i, source + i, bytes - i);
#else
  memcpy(target, source, bytes);
#endif
}

inline void copy_tile(void* to, const void* from, int64_t bytes, bool stream) {
  stream ? stream_copy(to, from, bytes) : static_cast<void>(memcpy(to, from, bytes));
}

// Asks for what a tile or two further on begins with, up to the second-level cache: processors follow a stream by
// themselves, but stop at the end of a page. More lines than these would keep others from being asked for.
inline void fetch_ahead(const void* tile) {
  for (int64_t byte = 2048; byte < 2048 + 8 * 64; byte += 64) {
    const intptr_t address = reinterpret_cast<intptr_t>(tile) + byte;  // beyond the tensor's end is no harm
    __builtin_prefetch(reinterpret_cast<const void*>(address), 0, 2);
  }
}

// Tiles of storage type S for what takes numbers of type L.
template <class S, class L = InLoops<S>>
struct Tiles {
  static constexpr bool direct = sizeof(S) == sizeof(L);
  alignas(64) static constexpr S zeros[TILE] = {};

  // The numbers of a tile; `buffer` has room for TILE elements.
  static const L* read(AddressRow list, const Span& tile, L* buffer) {
    const S* source = has(list, tile.tensor) ? at<S>(list, tile) : zeros;
    if (sizeof(S) >= 4) fetch_ahead(source);  // 16-bit types wait for arithmetic
    if constexpr (direct) {
      return source;
    } else {
      widen_all(source, tile.count, buffer);
      return buffer;
    }
  }

  // Where a loop writes what `write` will then bring into the tensor. `stream`: past the caches, for a tensor that is
  // only written, whose lines would otherwise be read first.
  static L* target(S* tensor, L* buffer, bool stream = false) {
    if constexpr (direct) {
      return stream ? buffer : tensor;
    } else {
      return buffer;
    }
  }

  static void write(S* tensor, const L* values, int64_t count, bool stream = false) {
    if constexpr (direct) {
      if (stream) stream_copy(tensor, values, count * sizeof(S));
    } else {
      narrow_all(values, count, tensor);
    }
  }
};

}  // namespace
}  // namespace gam
