// Sums in double, in an order that depends on element positions only: not on threads, alignment or instruction set.
#pragma once

#include <string.h>

#include "walk.h"

// Bytes of a vector register; each instruction set's unit sets its own.
#ifndef GAM_VECTOR_BYTES
#define GAM_VECTOR_BYTES 16
#endif

namespace gam {
namespace {

constexpr int LANES = 16;  // element i goes to running sum i % LANES, whatever the width of the registers
constexpr int WIDTH = GAM_VECTOR_BYTES / sizeof(double);
constexpr int VECTORS = LANES / WIDTH;

typedef double Doubles __attribute__((vector_size(GAM_VECTOR_BYTES)));
typedef float Floats __attribute__((vector_size(GAM_VECTOR_BYTES / 2)));

inline __attribute__((always_inline)) Doubles load(const double* p) {
  Doubles v;
  memcpy(&v, p, sizeof(v));
  return v;
}

inline __attribute__((always_inline)) Doubles load(const float* p) {
#ifdef GAM_LOAD_FLOATS
  return GAM_LOAD_FLOATS(p);  // compilers take several instructions for what is one
#else
  Floats v;
  memcpy(&v, p, sizeof(v));
  return __builtin_convertvector(v, Doubles);
#endif
}

// sums += a * b, for LANES elements.
template <class C>
inline __attribute__((always_inline)) void add_products(Doubles (&sums)[VECTORS], const C* a, const C* b) {
  for (int v = 0; v < VECTORS; ++v) sums[v] += load(a + v * WIDTH) * load(b + v * WIDTH);
}

inline double total_of(const Doubles (&sums)[VECTORS]) {
  double lanes[LANES], total = 0.0;
  memcpy(lanes, sums, sizeof(lanes));
  for (int j = 0; j < LANES; ++j) total += lanes[j];
  return total;
}

// The last, incomplete LANES elements, filled up with zeros.
template <class C>
struct Tail {
  C values[LANES] = {};
  Tail(const C* a, int64_t count) { memcpy(values, a, count * sizeof(C)); }
};

template <class C>
double sum_of_squares(const C* a, int64_t count) {
  Doubles sums[VECTORS] = {};
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) add_products(sums, a + i, a + i);
  const Tail<C> tail(a + i, count - i);
  add_products(sums, tail.values, tail.values);
  return total_of(sums);
}

// Sum of (a - b)^2, the difference in compute type.
template <class C>
double sum_of_squared_differences(const C* a, const C* b, int64_t count) {
  Doubles sums[VECTORS] = {};
  C difference[LANES];
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    for (int j = 0; j < LANES; ++j) difference[j] = a[i + j] - b[i + j];
    add_products(sums, difference, difference);
  }
  const Tail<C> tail_a(a + i, count - i), tail_b(b + i, count - i);
  for (int j = 0; j < LANES; ++j) difference[j] = tail_a.values[j] - tail_b.values[j];
  add_products(sums, difference, difference);
  return total_of(sums);
}

// out += sums of a a, a b and b b, two places apart: rows of counted and of other tensors alternate.
template <class C>
void add_three_products(const C* a, const C* b, int64_t count, double* out) {
  Doubles aa[VECTORS] = {}, ab[VECTORS] = {}, bb[VECTORS] = {};
  auto add = [&](const C* p, const C* q) __attribute__((always_inline)) {
    add_products(aa, p, p);
    add_products(ab, p, q);
    add_products(bb, q, q);
  };
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) add(a + i, b + i);
  const Tail<C> tail_a(a + i, count - i), tail_b(b + i, count - i);
  add(tail_a.values, tail_b.values);
  out[0] += total_of(aa);
  out[2] += total_of(ab);
  out[4] += total_of(bb);
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
