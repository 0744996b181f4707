// bfloat16 and float16 storage: conversions, rounding to nearest even, and stochastic rounding by a counter-based hash.
// gam_fused/backends/rounding.py specifies the latter bit for bit. Written without branches, so that loops over it
// vectorise.
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

GAM_HOST_DEVICE void narrow(float x, float& out) { out = x; }
GAM_HOST_DEVICE void narrow(double x, double& out) { out = x; }

GAM_HOST_DEVICE void narrow(float x, BFloat16& out) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
#else
  uint32_t bits = bits_of(x);
  uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
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
  uint32_t normal = (magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  uint32_t rounded = magnitude < 0x38800000u ? subnormal : normal;  // 2^-14
  rounded = magnitude >= 0x477FF000u ? 0x7C00u : rounded;           // 65520 and more
  rounded = magnitude > 0x7F800000u ? 0x7E00u : rounded;
  out.bits = uint16_t(sign | rounded);
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// Stochastic rounding (docs/design.md, section 4): up with the probability of the distance to the lower
// neighbour. Beyond the largest number, where the upper one is infinity, to nearest.

// A 32-bit integer hash.
GAM_HOST_DEVICE uint32_t mix32(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7FEB352Du;
  x ^= x >> 15;
  x *= 0x846CA68Bu;
  return x ^ (x >> 16);
}

// The key of one ascent of one step; `seed` and `step` are whole numbers kept in float64.
GAM_HOST_DEVICE uint32_t noise_key(double seed, double step, int ascent) {
  return mix32(uint32_t(int64_t(seed)) ^ mix32(uint32_t(int64_t(step)) * 4u + uint32_t(ascent)));
}

// The stream of elements whose positions in the flat vector share their upper 32 bits.
GAM_HOST_DEVICE uint32_t noise_stream(uint32_t key, int64_t position) { return mix32(uint32_t(position >> 32) ^ key); }

// The noise of one element: `low` is the lower half of its position.
GAM_HOST_DEVICE uint32_t noise(uint32_t stream, uint32_t low) { return mix32(stream + low); }

GAM_HOST_DEVICE float drop_bits(float x, uint32_t noise, uint32_t low) {
  return float_of((bits_of(x) + (noise & low)) & ~low);
}

GAM_HOST_DEVICE void stochastic_round(float x, uint32_t noise, BFloat16& out) {
  bool between = (bits_of(x) & 0x7FFFFFFFu) < 0x7F7F0000u;
  narrow(between ? drop_bits(x, noise, 0xFFFFu) : x, out);
}

GAM_HOST_DEVICE void stochastic_round(float x, uint32_t noise, Float16& out) {
  uint32_t magnitude = bits_of(x) & 0x7FFFFFFFu;
  float fraction = float(int32_t(noise >> 8)) * 0x1p-24f;
  float subnormal = floorf(x * 0x1p24f + fraction) * 0x1p-24f;  // float16 is 2^-24 apart below 2^-14
  float rounded = magnitude < 0x38800000u ? subnormal : drop_bits(x, noise, 0x1FFFu);
  narrow(magnitude < 0x477FE000u ? rounded : x, out);
}

}  // namespace gam
