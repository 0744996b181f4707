// The body of an instruction set's unit: every verb for every dtype, in the table GAM_KERNELS. A unit includes the
// system headers, switches the compiler to its instruction set, and then includes this. Everything below has internal
// linkage, so that the linker cannot give one unit's code to another.
#pragma once

#include "combine.h"
#include "combined_update.h"
#include "direction_products.h"
#include "perturb.h"
#include "restore.h"
#include "squared_norm.h"

namespace gam {
namespace {

// A verb for all dtypes, as one function.
#define GAM_FOR_DTYPES(verb, Arguments)                                      \
  void verb##_any(int dtype, const Arguments& v, ParallelFor parallel_for) { \
    switch (dtype) {                                                         \
      case DType::FLOAT32:                                                   \
        return verb<float>(v, parallel_for);                                 \
      case DType::FLOAT64:                                                   \
        return verb<double>(v, parallel_for);                                \
      case DType::BFLOAT16:                                                  \
        return verb<BFloat16>(v, parallel_for);                              \
      case DType::FLOAT16:                                                   \
        return verb<Float16>(v, parallel_for);                               \
    }                                                                        \
  }

GAM_FOR_DTYPES(squared_norm, SquaredNorm)
GAM_FOR_DTYPES(direction_products, DirectionProducts)
GAM_FOR_DTYPES(perturb, Perturb)
GAM_FOR_DTYPES(combined_update, CombinedUpdate)
GAM_FOR_DTYPES(combine, Combine)
GAM_FOR_DTYPES(restore, Restore)

}  // namespace

const Kernels GAM_KERNELS = {squared_norm_any, direction_products_any, perturb_any, combined_update_any, combine_any,
                             restore_any};

}  // namespace gam
