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

// total[row] = sum over the columns of that row.
inline void row_sums(const Matrix& partials, double* total) {
  for (int64_t row = 0; row < partials.rows; ++row) {
    const double* p = partials.data + row * partials.stride;
    double lanes[4] = {};
    int64_t i = 0;
    for (; i + 4 <= partials.columns; i += 4)
      for (int j = 0; j < 4; ++j) lanes[j] += p[i + j];
    for (int j = 0; i < partials.columns; ++i, ++j) lanes[j] += p[i];
    total[row] = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
  }
}

// Columns that no chunk writes.
inline void clear_unused(const Matrix& partials, const Layout& layout) {
  for (int64_t row = 0; row < partials.rows; ++row)
    for (int64_t i = chunks_of(layout); i < partials.columns; ++i) partials.data[row * partials.stride + i] = 0.0;
}

inline void put(const Matrix& partials, int64_t row, int64_t chunk, double value) {
  partials.data[row * partials.stride + chunk] = value;
}

}  // namespace
}  // namespace gam
