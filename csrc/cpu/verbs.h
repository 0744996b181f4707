// The verbs as the CPU kernels take them, and the table of kernels of one instruction set.
#pragma once

#include "../verbs.h"

namespace gam {

// One address per tensor, 0 where a tensor is missing (a vector of zeros); nullptr where the list is not used.
using Addresses = const int64_t*;

// T tensors as one flat vector, cut into chunks of equal size.
struct Layout {
  const int64_t* starts;   // [T + 1] first element of each tensor, and N
  const int64_t* groups;   // [T] row of the coefficient table
  const int64_t* counted;  // [T] whether the tensor counts in norms
  int64_t tensors, chunk;
};

using SquaredNorm = Verbs<Layout, Addresses>::SquaredNorm;
using DirectionProducts = Verbs<Layout, Addresses>::DirectionProducts;
using Perturb = Verbs<Layout, Addresses>::Perturb;
using CombinedUpdate = Verbs<Layout, Addresses>::CombinedUpdate;
using Combine = Verbs<Layout, Addresses>::Combine;
using Restore = Verbs<Layout, Addresses>::Restore;

// Runs body(begin, end, context) over parts of [0, count), each at least `grain` long where there are as many.
using Body = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = void (*)(int64_t count, int64_t grain, Body body, void* context);

// The verbs compiled for one instruction set. `dtype` is a DType.
struct Kernels {
  void (*squared_norm)(int dtype, const SquaredNorm&, ParallelFor);
  void (*direction_products)(int dtype, const DirectionProducts&, ParallelFor);
  void (*perturb)(int dtype, const Perturb&, ParallelFor);
  void (*combined_update)(int dtype, const CombinedUpdate&, ParallelFor);
  void (*combine)(int dtype, const Combine&, ParallelFor);
  void (*restore)(int dtype, const Restore&, ParallelFor);
};

extern const Kernels baseline_kernels;
#if defined(__x86_64__) && defined(__GNUC__)
#define GAM_X86 1
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#endif

}  // namespace gam
