// Stochastic rounding of perturbed low-precision weights by a counter-based hash: up with the probability of the
// distance to the lower neighbour. Beyond the largest number, where the upper one is infinity, to nearest.
// gam_fused/backends/math/rounding.py specifies it bit for bit.
#pragma once

#include "numbers.h"

namespace gam {

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

// The bfloat16 that x becomes, as a float. The largest number is odd: a tie beyond it goes up.
GAM_HOST_DEVICE float stochastic(float x, uint32_t noise, BFloat16) {
  uint32_t bits = bits_of(x), magnitude = bits & 0x7FFFFFFFu;
  uint32_t up = magnitude < 0x7F7F0000u ? noise & 0xFFFFu : 0x8000u;
  return float_of(magnitude > 0x7F800000u ? 0x7FC00000u : (bits + up) & ~0xFFFFu);
}

// The float16 that x becomes, as a float.
GAM_HOST_DEVICE float stochastic(float x, uint32_t noise, Float16) {
  uint32_t bits = bits_of(x), magnitude = bits & 0x7FFFFFFFu;
  float fraction = float(int32_t(noise >> 8)) * 0x1p-24f;
  float subnormal = floorf(x * 0x1p24f + fraction) * 0x1p-24f;  // float16 is 2^-24 apart below 2^-14
  uint32_t up = magnitude < 0x477FE000u ? noise & 0x1FFFu : 0x1000u;
  float normal = float_of((bits + up) & ~0x1FFFu);
  float rounded = magnitude < 0x38800000u ? subnormal : normal;
  rounded = rounded * 0x1p112f * 0x1p-112f;  // 65536 and more become infinite
  return x == x ? rounded : x;
}

template <class S>
GAM_HOST_DEVICE void stochastic_round(float x, uint32_t noise, S& out) {
  narrow_exact(stochastic(x, noise, S{}), out);
}

}  // namespace gam
