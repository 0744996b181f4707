// The kernels, and what each takes, as raw pointers; no torch. The twin of gam_fused/backends/operands.py, field by
// field and in its order: a test compares the two. gam_fused/backends/reference.py specifies what the kernels do.
//
// Lists of fields and of kernels are macros, so that whatever is made of each (the structs here, the operators'
// parameters and checks in operators.h, tables of functions) names neither again.
#pragma once

#include <stdint.h>

namespace gam {

// How many chunks N elements make; an empty vector makes one too.
static inline int64_t chunk_count(int64_t elements, int64_t chunk) {
  return elements > 0 ? (elements - 1) / chunk + 1 : 1;  // not (elements + chunk - 1) / chunk, which may overflow
}

// The memory in which a kernel adds up sums of its chunks, as `Layout.workspace` (gam_fused/backends/tensor_lists.py)
// makes it: a ticket for each group of chunks and one for all groups, as unsigned int in the memory of a double; then
// for each row of the result the sums of its chunks, and behind those of all rows the sums of its groups.
constexpr int GROUP = 64, MAX_ROWS = 6;

static inline int64_t group_count(int64_t chunks) { return (chunks - 1) / GROUP + 1; }

static inline int64_t workspace_size(int64_t chunks) {
  return group_count(chunks) + 1 + MAX_ROWS * (chunks + group_count(chunks));
}

// float64 [rows, columns] with unit stride between columns.
struct Matrix {
  double* data;
  int64_t rows, columns, stride;
};

// FIELD(kind, name); `List` and the other kinds are types of `Operands` below, and functions of `Arguments`
// (arguments.h).

#define GAM_SQUARED_NORM(FIELD) \
  FIELD(Gradients, x)           \
  FIELD(Gradients, y)           \
  FIELD(Gradients, weight)      \
  FIELD(Norm, partials)

#define GAM_DIRECTION_PRODUCTS(FIELD) \
  FIELD(Gradients, g1)                \
  FIELD(Gradients, last)              \
  FIELD(Folded, folded)               \
  FIELD(Coefficients, coefficients)   \
  FIELD(Products, partials)

#define GAM_PERTURB(FIELD)          \
  FIELD(Weights, theta)             \
  FIELD(Point, base)                \
  FIELD(Gradients, x)               \
  FIELD(Gradients, y)               \
  FIELD(Folding, folded)            \
  FIELD(Backup, backup)             \
  FIELD(Coefficients, coefficients) \
  FIELD(NormTotals, partials)       \
  FIELD(Control, control)           \
  FIELD(Squares, realised)          \
  FIELD(Ascent, ascent)             \
  FIELD(Switch, adaptive)

#define GAM_COMBINED_UPDATE(FIELD)  \
  FIELD(Weights, theta)             \
  FIELD(Point, backup)              \
  FIELD(Gradients, g1)              \
  FIELD(Gradients, last)            \
  FIELD(Folded, folded)             \
  FIELD(State, state1)              \
  FIELD(State, state2)              \
  FIELD(State, state3)              \
  FIELD(Counters, steps)            \
  FIELD(Coefficients, coefficients) \
  FIELD(ProductTotals, partials)    \
  FIELD(Control, control)           \
  FIELD(Squares, direction)         \
  FIELD(BaseOptimizer, algorithm)

#define GAM_COMBINE(FIELD)          \
  FIELD(Directions, out)            \
  FIELD(Gradients, g1)              \
  FIELD(Gradients, last)            \
  FIELD(Folded, folded)             \
  FIELD(Coefficients, coefficients) \
  FIELD(ProductTotals, partials)    \
  FIELD(Control, control)           \
  FIELD(Squares, direction)

#define GAM_RESTORE(FIELD) \
  FIELD(Weights, theta)    \
  FIELD(Source, backup)

// KERNEL(struct, function, operator, fields).
#define GAM_EACH_KERNEL(KERNEL)                                                               \
  KERNEL(SquaredNorm, squared_norm, "squared_norm", GAM_SQUARED_NORM)                         \
  KERNEL(DirectionProducts, direction_products, "direction_products", GAM_DIRECTION_PRODUCTS) \
  KERNEL(Perturb, perturb, "perturb_", GAM_PERTURB)                                           \
  KERNEL(CombinedUpdate, combined_update, "combined_update_", GAM_COMBINED_UPDATE)            \
  KERNEL(Combine, combine, "combine_", GAM_COMBINE)                                           \
  KERNEL(Restore, restore, "restore_", GAM_RESTORE)

// `Layout` is a backend's view of the flat vector, `List` one of its lists of tensors; both are cheap to copy.
template <class Layout, class List>
struct Operands {
  // Lists in the dtype of storage; in `Folded` and `Folding` in that of compute, in `Counters` 0-d float.
  using Weights = List;  // must be there
  using Source = List;   // the same, only read
  using Point = List;
  using Backup = List;
  using Gradients = List;  // tensors may be missing, as in all below
  using Directions = List;
  using Folded = List;
  using Folding = List;
  using State = List;
  using Counters = List;
  // Tables.
  using Coefficients = const double*;  // [groups, COLUMNS]
  using Control = double*;             // [CONTROLS]
  // Sums over the flat vector, one column, which the kernel writes.
  using Norm = Matrix;      // 2 rows
  using Products = Matrix;  // 6 rows or 2
  using Squares = Matrix;   // 1 row
  // Sums of all blocks, a column of each, which it adds up.
  using NormTotals = Matrix;
  using ProductTotals = Matrix;
  using Ascent = int;
  using Switch = bool;
  using BaseOptimizer = int;  // an Algorithm

#define GAM_MEMBER(Kind, name) Kind name;
#define GAM_STRUCT(Name, function, operator_, FIELDS) \
  struct Name {                                       \
    Layout layout;                                    \
    FIELDS(GAM_MEMBER)                                \
  };
  GAM_EACH_KERNEL(GAM_STRUCT)
#undef GAM_STRUCT
#undef GAM_MEMBER
};

}  // namespace gam
