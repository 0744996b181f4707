// The kernels for x86-64 with AVX-512.
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "operands.h"

#ifdef GAM_X86
#include <immintrin.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")
#endif
#include "x86.h"
#define GAM_BFLOAT16_IN_LOOPS
#define GAM_KERNELS avx512_kernels
#include "kernels.h"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
