// The body of an instruction set's unit: every kernel for every dtype, in the table GAM_KERNELS. A unit includes the
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

// A kernel for all dtypes, as one function.
#define GAM_FOR_DTYPES(Name, function, operator_, FIELDS)                   \
  void function##_any(int dtype, const Name& v, ParallelFor parallel_for) { \
    switch (dtype) {                                                        \
      case DType::FLOAT32:                                                  \
        return function<float>(v, parallel_for);                            \
      case DType::FLOAT64:                                                  \
        return function<double>(v, parallel_for);                           \
      case DType::BFLOAT16:                                                 \
        return function<BFloat16>(v, parallel_for);                         \
      case DType::FLOAT16:                                                  \
        return function<Float16>(v, parallel_for);                          \
    }                                                                       \
  }
GAM_EACH_KERNEL(GAM_FOR_DTYPES)
#undef GAM_FOR_DTYPES

}  // namespace

#define GAM_ENTRY(Name, function, operator_, FIELDS) function##_any,
const Kernels GAM_KERNELS = {GAM_EACH_KERNEL(GAM_ENTRY)};
#undef GAM_ENTRY

}  // namespace gam
