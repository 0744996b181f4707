// The five verbs as the CPU kernels take them: raw pointers, no torch. gam_fused/rooms/reference.py specifies each.
#pragma once

#include <stdint.h>

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

// float64 [rows, columns] with unit stride between columns.
struct Matrix {
  double* data;
  int64_t rows, columns, stride;
};

// Runs body(begin, end, context) over parts of [0, count), each at least `grain` long where there are as many.
using Body = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = void (*)(int64_t count, int64_t grain, Body body, void* context);

struct SquaredNorm {
  Layout layout;
  Addresses x, y, weight;
  Matrix partials;  // [2, chunks]
};

struct DirectionProducts {
  Layout layout;
  Addresses x1, x3, acc;
  const double* coefficients;  // [groups, COLUMNS]
  Matrix partials;             // [6 or 2, chunks]
};

struct Perturb {
  Layout layout;
  Addresses theta, base, x, y, acc, backup;
  const double* coefficients;
  Matrix partials;  // [2, columns of all buckets]
  double* control;  // [CONTROLS]
  Matrix realised;  // [1, chunks]
  int ascent;
  bool adaptive;
};

struct CombinedUpdate {
  Layout layout;
  Addresses theta, backup, x1, x3, acc, first, second, third, steps;
  const double* coefficients;
  Matrix partials;  // [6 or 2, columns of all buckets]
  double* control;
  Matrix direction;  // [1, chunks]
  int algorithm;
};

struct Combine {
  Layout layout;
  Addresses out, x1, x3, acc;
  const double* coefficients;
  Matrix partials;
  double* control;
  Matrix direction;
};

struct Restore {
  Layout layout;
  Addresses theta, backup;
};

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
