// Storage types and what they are computed in, conversions with rounding to nearest even, and arithmetic that differs
// from C's in places. Written without branches, so that loops over it vectorise. C, here and beside, is the compute
// type: float for float, bfloat16 and float16 storage, double for double.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)
#define GAM_HOST_DEVICE static __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define GAM_HOST_DEVICE static inline __attribute__((always_inline))
#else
#define GAM_HOST_DEVICE static inline
#endif

#ifdef __CUDACC__
#define GAM_UNROLL _Pragma("unroll")
#else
#define GAM_UNROLL
#endif

namespace gam {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

// The type a storage type S is computed in.
template <class S>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class S>
using Compute = typename ComputeOf<S>::type;

GAM_HOST_DEVICE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

GAM_HOST_DEVICE float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

// Storage to compute type: exact.

GAM_HOST_DEVICE float widen(float x) { return x; }
GAM_HOST_DEVICE double widen(double x) { return x; }
GAM_HOST_DEVICE float widen(BFloat16 x) { return float_of(uint32_t(x.bits) << 16); }

GAM_HOST_DEVICE float widen(Float16 x) {
#ifdef __CUDA_ARCH__  // the same in one instruction
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  uint32_t exponent = (x.bits >> 10) & 31u, mantissa = x.bits & 1023u, sign = uint32_t(x.bits & 0x8000u) << 16;
  uint32_t biased = exponent + (exponent == 31u ? 224u : 112u);  // 31, infinity and NaN, becomes 255
  float subnormal = float(int32_t(mantissa)) * 0x1p-24f;
  uint32_t magnitude = exponent == 0u ? bits_of(subnormal) : (biased << 23 | mantissa << 13);
  return float_of(sign | magnitude);
#endif
}

// Compute type to storage, to nearest, ties to even; NaN stays NaN.

// Added to bits of which the lower `dropped` go, it makes cutting them off round to nearest even.
GAM_HOST_DEVICE uint32_t half_up_to_even(uint32_t bits, int dropped) {
  return (1u << (dropped - 1)) - 1u + ((bits >> dropped) & 1u);
}

GAM_HOST_DEVICE void narrow(float x, float& out) { out = x; }
GAM_HOST_DEVICE void narrow(double x, double& out) { out = x; }

GAM_HOST_DEVICE void narrow(float x, BFloat16& out) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
#else
  uint32_t bits = bits_of(x);
  uint32_t rounded = (bits + half_up_to_even(bits, 16)) >> 16;
  out.bits = uint16_t((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
#endif
}

GAM_HOST_DEVICE void narrow(float x, Float16& out) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
#else
  uint32_t bits = bits_of(x), magnitude = bits & 0x7FFFFFFFu, sign = (bits >> 16) & 0x8000u;
  // Floats in [0.5, 1) are 2^-24 apart, as float16's subnormals are: the sum rounds as they do.
  uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  uint32_t normal = (magnitude - (112u << 23) + half_up_to_even(magnitude, 13)) >> 13;
  uint32_t rounded = magnitude < 0x38800000u ? subnormal : normal;  // 2^-14
  rounded = magnitude >= 0x477FF000u ? 0x7C00u : rounded;           // 65520 and more
  rounded = magnitude > 0x7F800000u ? 0x7E00u : rounded;
  out.bits = uint16_t(sign | rounded);
#endif
}

// The same for a number that storage holds as it is; a NaN has only its uppermost bits.
template <class C, class S>
GAM_HOST_DEVICE void narrow_exact(C x, S& out) {
  narrow(x, out);
}
GAM_HOST_DEVICE void narrow_exact(float x, BFloat16& out) { out.bits = uint16_t(bits_of(x) >> 16); }

// float and double versions of what differs by name in C.
GAM_HOST_DEVICE float square_root(float x) { return sqrtf(x); }
GAM_HOST_DEVICE double square_root(double x) { return sqrt(x); }

GAM_HOST_DEVICE bool is_finite(double x) { return fabs(x) <= 1.7976931348623157e308; }

// Weights may be infinite (masks). What does not move stays there, as in torch: 0 * inf and inf - inf, both NaN, are
// not computed.

// step * factor; 0 where `step` is 0.
template <class C>
GAM_HOST_DEVICE C times(C step, C factor) {
  return step * (step == C(0) ? C(0) : factor);
}

// to - from; 0 where they are equal.
template <class C>
GAM_HOST_DEVICE C change_of(C to, C from) {
  return to == from ? C(0) : to - from;
}

}  // namespace gam
