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

GAM_HOST_DEVICE float drop_bits(float x, uint32_t noise, uint32_t low) {
  return float_of((bits_of(x) + (noise & low)) & ~low);
}

// The neighbour of x in a storage type that `noise` chooses, as a float; `narrow` takes it there.
GAM_HOST_DEVICE float neighbour(float x, uint32_t noise, BFloat16) {
  bool between = (bits_of(x) & 0x7FFFFFFFu) < 0x7F7F0000u;
  return between ? drop_bits(x, noise, 0xFFFFu) : x;
}

GAM_HOST_DEVICE float neighbour(float x, uint32_t noise, Float16) {
  uint32_t magnitude = bits_of(x) & 0x7FFFFFFFu;
  float fraction = float(int32_t(noise >> 8)) * 0x1p-24f;
  float subnormal = floorf(x * 0x1p24f + fraction) * 0x1p-24f;  // float16 is 2^-24 apart below 2^-14
  float rounded = magnitude < 0x38800000u ? subnormal : drop_bits(x, noise, 0x1FFFu);
  return magnitude < 0x477FE000u ? rounded : x;
}

template <class S>
GAM_HOST_DEVICE void stochastic_round(float x, uint32_t noise, S& out) {
  narrow(neighbour(x, noise, S{}), out);
}

}  // namespace gam
