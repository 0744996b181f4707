// The kernels for x86-64 with AVX2.
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "operands.h"

#ifdef GAM_X86
#include <immintrin.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include "x86.h"
#define GAM_KERNELS avx2_kernels
#include "kernels.h"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
