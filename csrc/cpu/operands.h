// Operands as the CPU kernels take them, and the table of kernels of one instruction set.
#pragma once

#include "../operands.h"

namespace gam {

// One address per tensor, 0 where a tensor is missing (a vector of zeros); nullptr where the list is not used.
using AddressRow = const int64_t*;

// T tensors as one flat vector, cut into chunks of equal size.
struct Layout {
  const int64_t* starts;   // [T + 1] first element of each tensor, and N
  const int64_t* groups;   // [T] row of the coefficient table
  const int64_t* counted;  // [T] whether the tensor counts in norms
  int64_t tensors, chunk;
  double* workspace;
};

#define GAM_USING(Name, function, operator_, FIELDS) using Name = Operands<Layout, AddressRow>::Name;
GAM_EACH_KERNEL(GAM_USING)
#undef GAM_USING

// Runs body(begin, end, context) over parts of [0, count), each at least `grain` long where there are as many.
using Body = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = void (*)(int64_t count, int64_t grain, Body body, void* context);

// The kernels compiled for one instruction set. `dtype` is a DType.
struct Kernels {
#define GAM_ENTRY(Name, function, operator_, FIELDS) void (*function)(int dtype, const Name&, ParallelFor);
  GAM_EACH_KERNEL(GAM_ENTRY)
#undef GAM_ENTRY
};

extern const Kernels baseline_kernels;
#if defined(__x86_64__) && defined(__GNUC__)
#define GAM_X86 1
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#endif

}  // namespace gam
