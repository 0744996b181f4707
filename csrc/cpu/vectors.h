// What vector registers do, under one name for every instruction set. A unit may define, before it includes this,
//     GAM_VECTOR_BYTES            what a register holds
//     GAM_TO_DOUBLES(v)           Floats to Doubles: compilers take several instructions for what is one
//     GAM_MULTIPLY_ADD(a, b, c)   a b + c of Doubles, rounded once
//     GAM_STREAM_LINE(to, from)   a store of 64 bytes past the caches
//     GAM_FLOAT16                 how many numbers widen_float16 and narrow_float16 convert, and load_float16
//     GAM_BFLOAT16_IN_LOOPS       that loops over bfloat16 itself are fast
// Results have the same bits with and without.
#pragma once

#include <string.h>

#include "../math/numbers.h"

#ifndef GAM_VECTOR_BYTES
#define GAM_VECTOR_BYTES 16
#endif

// Before a loop that reads and writes an element at a time, though its arrays may be the same.
#ifdef __clang__
#define GAM_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define GAM_INDEPENDENT _Pragma("GCC ivdep")
#endif

namespace gam {
namespace {

constexpr int WIDTH = GAM_VECTOR_BYTES / sizeof(double);

typedef double Doubles __attribute__((vector_size(GAM_VECTOR_BYTES)));
typedef float Floats __attribute__((vector_size(GAM_VECTOR_BYTES / 2)));
typedef uint32_t Words __attribute__((vector_size(GAM_VECTOR_BYTES / 2)));

template <class Vector, class C>
inline __attribute__((always_inline)) Vector vector_at(const C* p) {
  Vector v;
  memcpy(&v, p, sizeof(v));
  return v;
}

inline __attribute__((always_inline)) Doubles to_doubles(Floats v) {
#ifdef GAM_TO_DOUBLES
  return GAM_TO_DOUBLES(v);
#else
  return __builtin_convertvector(v, Doubles);
#endif
}

// What loops over numbers of storage type S read and write, one by one with `widen` and `narrow`: S itself where
// compilers vectorise that well, the compute type, converted before and after, where they do not.
template <class S>
struct InLoopsOf {
  using type = Compute<S>;
};
#ifdef GAM_BFLOAT16_IN_LOOPS
template <>
struct InLoopsOf<BFloat16> {
  using type = BFloat16;
};
#endif
template <class S>
using InLoops = typename InLoopsOf<S>::type;

// Register `v` of the numbers at p, in compute type.
inline __attribute__((always_inline)) Doubles load(const double* p, int v) { return vector_at<Doubles>(p + v * WIDTH); }
inline __attribute__((always_inline)) Floats load(const float* p, int v) { return vector_at<Floats>(p + v * WIDTH); }

// Where number i of those loaded stands, registers one behind the other.
template <class S>
constexpr int place_of(int i) {
  return i;
}

#ifdef GAM_FLOAT16
inline __attribute__((always_inline)) Floats load(const Float16* p, int v) {
  return (Floats)load_float16(p + v * WIDTH);
}

// Two registers share the numbers of even and of odd position: so they are widened without being moved.
inline __attribute__((always_inline)) Floats load(const BFloat16* p, int v) {
  const Words pairs = vector_at<Words>(p + v / 2 * 2 * WIDTH);
  return (Floats)(v % 2 ? pairs & 0xFFFF0000u : pairs << 16);
}

template <>
constexpr int place_of<BFloat16>(int i) {
  return (i / (2 * WIDTH) * 2 + i % 2) * WIDTH + i % (2 * WIDTH) / 2;
}

// What sums over numbers of storage type S read.
template <class S>
using InSums = S;
#else
template <class S>
using InSums = Compute<S>;
#endif

// sum + a * b. The product of two floats is exact in double, so that one rounding is as good as two.
inline __attribute__((always_inline)) Doubles add_product(Doubles sum, Doubles a, Doubles b) { return sum + a * b; }
inline __attribute__((always_inline)) Doubles add_product(Doubles sum, Floats a, Floats b) {
#ifdef GAM_MULTIPLY_ADD
  return GAM_MULTIPLY_ADD(to_doubles(a), to_doubles(b), sum);
#else
  return sum + to_doubles(a) * to_doubles(b);
#endif
}

// Conversions of `count` elements.
template <class S>
void widen_all(const S* from, int64_t count, Compute<S>* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = widen(from[i]);
}

template <class S>
void narrow_all(const Compute<S>* from, int64_t count, S* to) {
  for (int64_t i = 0; i < count; ++i) narrow(from[i], to[i]);
}

#ifdef GAM_FLOAT16
inline void widen_all(const Float16* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + GAM_FLOAT16 <= count; i += GAM_FLOAT16) widen_float16(from + i, to + i);
  for (; i < count; ++i) to[i] = widen(from[i]);
}

inline void narrow_all(const float* from, int64_t count, Float16* to) {
  int64_t i = 0;
  for (; i + GAM_FLOAT16 <= count; i += GAM_FLOAT16) narrow_float16(from + i, to + i);
  for (; i < count; ++i) narrow(from[i], to[i]);
}
#endif

}  // namespace
}  // namespace gam
