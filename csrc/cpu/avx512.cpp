// The kernels for x86-64 with AVX-512.
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "operands.h"

#ifdef GAM_X86
#include <immintrin.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
#endif
#define GAM_VECTOR_BYTES 32
#define GAM_LOAD_FLOATS(p) (Doubles) _mm256_cvtps_pd(_mm_loadu_ps(p))
// Stores 32 bytes at an aligned address past the caches; `for_each_chunk` orders them before what follows.
#define GAM_STREAM(to, from) \
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))
#define GAM_KERNELS avx512_kernels
#include "kernels.h"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
