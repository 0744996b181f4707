// The verbs' operands as raw pointers, for every compiled room; no torch. gam_fused/backends/reference.py specifies each
// verb.
#pragma once

#include <stdint.h>

namespace gam {

// How many chunks N elements make; an empty vector makes one too.
static inline int64_t chunk_count(int64_t elements, int64_t chunk) {
  return elements > 0 ? (elements - 1) / chunk + 1 : 1;  // not (elements + chunk - 1) / chunk, which may overflow
}

// float64 [rows, columns] with unit stride between columns.
struct Matrix {
  double* data;
  int64_t rows, columns, stride;
};

// `Layout` is a room's view of the flat vector, `List` one of its lists of tensors; both are cheap to copy.
template <class Layout, class List>
struct Verbs {
  struct SquaredNorm {
    Layout layout;
    List x, y, weight;
    Matrix partials;  // [2, chunks]
  };

  struct DirectionProducts {
    Layout layout;
    List x1, x3, acc;
    const double* coefficients;  // [groups, COLUMNS]
    Matrix partials;             // [6 or 2, chunks]
  };

  struct Perturb {
    Layout layout;
    List theta, base, x, y, acc, backup;
    const double* coefficients;
    Matrix partials;  // [2, columns of all buckets]
    double* control;  // [CONTROLS]
    Matrix realised;  // [1, chunks]
    int ascent;
    bool adaptive;
  };

  struct CombinedUpdate {
    Layout layout;
    List theta, backup, x1, x3, acc, first, second, third, steps;
    const double* coefficients;
    Matrix partials;  // [6 or 2, columns of all buckets]
    double* control;
    Matrix direction;  // [1, chunks]
    int algorithm;
  };

  struct Combine {
    Layout layout;
    List out, x1, x3, acc;
    const double* coefficients;
    Matrix partials;
    double* control;
    Matrix direction;
  };

  struct Restore {
    Layout layout;
    List theta, backup;
  };
};

}  // namespace gam
