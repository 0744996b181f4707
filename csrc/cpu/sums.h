// Sums in double, in an order that depends on element positions only: not on threads, alignment or instruction set.
#pragma once

#include "vectors.h"
#include "walk.h"

namespace gam {
namespace {

constexpr int LANES = 16;  // element i goes to running sum i % LANES, whatever the width of the registers
constexpr int VECTORS = LANES / WIDTH;

// Running sums over numbers of storage type S, LANES at a time.
template <class S>
struct Sums {
  Doubles lanes[VECTORS] = {};

  inline __attribute__((always_inline)) void add_products(const S* a, const S* b) {
    for (int v = 0; v < VECTORS; ++v) lanes[v] = add_product(lanes[v], load(a, v), load(b, v));
  }

  // (a - b)^2, the difference in compute type.
  inline __attribute__((always_inline)) void add_squared_differences(const S* a, const S* b) {
    for (int v = 0; v < VECTORS; ++v) {
      const auto difference = load(a, v) - load(b, v);
      lanes[v] = add_product(lanes[v], difference, difference);
    }
  }

  double total() const {
    double values[LANES], total = 0.0;
    memcpy(values, lanes, sizeof(values));
    for (int i = 0; i < LANES; ++i) total += values[place_of<S>(i)];
    return total;
  }
};

// add(a, b) for LANES elements of both at a time; the last, incomplete ones are filled up with zeros.
template <class S, class Add>
inline __attribute__((always_inline)) void for_each_lanes(const S* a, const S* b, int64_t count, Add add) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) add(a + i, b + i);
  if (i == count) return;
  S last_a[LANES] = {}, last_b[LANES] = {};
  memcpy(last_a, a + i, (count - i) * sizeof(S));
  memcpy(last_b, b + i, (count - i) * sizeof(S));
  add(last_a, last_b);
}

template <class S>
double sum_of_squares(const S* a, int64_t count) {
  Sums<S> sums;
  for_each_lanes(a, a, count, [&](const S* p, const S*) __attribute__((always_inline)) { sums.add_products(p, p); });
  return sums.total();
}

template <class S>
double sum_of_squared_differences(const S* a, const S* b, int64_t count) {
  Sums<S> sums;
  for_each_lanes(a, b, count,
                 [&](const S* p, const S* q) __attribute__((always_inline)) { sums.add_squared_differences(p, q); });
  return sums.total();
}

// out += sums of a a, a b and b b, two places apart: rows of counted and of other tensors alternate.
template <class S>
void add_three_products(const S* a, const S* b, int64_t count, double* out) {
  Sums<S> aa, ab, bb;
  for_each_lanes(a, b, count, [&](const S* p, const S* q) __attribute__((always_inline)) {
    aa.add_products(p, p);
    ab.add_products(p, q);
    bb.add_products(q, q);
  });
  out[0] += aa.total();
  out[2] += ab.total();
  out[4] += bb.total();
}

inline double sum(const double* values, int64_t count) {
  double lanes[4] = {};
  int64_t i = 0;
  for (; i + 4 <= count; i += 4)
    for (int j = 0; j < 4; ++j) lanes[j] += values[i + j];
  for (int j = 0; i < count; ++i, ++j) lanes[j] += values[i];
  return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
}

// total[row] = the sum over all blocks, a column of each.
inline void row_sums(const Matrix& partials, double* total) {
  for (int64_t row = 0; row < partials.rows; ++row)
    total[row] = sum(partials.data + row * partials.stride, partials.columns);
}

// out[row] = the sum over all chunks of what visit(chunk, sums) adds to sums[row].
template <int ROWS, class Visit>
void sum_over_chunks(const Layout& layout, ParallelFor parallel_for, const Matrix& out, Visit visit) {
  const int64_t chunks = chunks_of(layout);
  double* workspace = layout.workspace;
  for_each_chunk(layout, parallel_for, [&](int64_t chunk) {
    double sums[ROWS] = {};
    visit(chunk, sums);
    for (int row = 0; row < ROWS; ++row) workspace[row * chunks + chunk] = sums[row];
  });
  for (int row = 0; row < ROWS; ++row) out.data[row * out.stride] = sum(workspace + row * chunks, chunks);
}

}  // namespace
}  // namespace gam
