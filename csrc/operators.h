// The operators of a compiled backend, made from the lists in operands.h: schemas are in
// gam_fused/backends/operators.py, kernels in the backend's own folder.
//
// An operator checks its arguments, brings them into the backend's form and runs the backend's kernel. Backend is an
// `Arguments<Backend>` and an `Operands<Layout, List>` with
//     static constexpr bool ON_CPU;
//     Layout layout();  List list(Addresses);  static bool used(List);  void run(operands);
//     void require_state(CombinedUpdate)
#pragma once

#include <type_traits>

#include "arguments.h"
#include "operands.h"

namespace gam {

// What operands have to be beyond what their kinds say.
template <class Backend, class Record>
void check_together(Backend& backend, const Record& v) {
  if constexpr (std::is_same_v<Record, typename Backend::DirectionProducts>) {
    const int64_t rows = backend.used(v.g1) ? 6 : 2;
    STD_TORCH_CHECK(v.partials.rows == rows, "gam_fused: partials must have ", rows, " rows, got ", v.partials.rows);
  }
  if constexpr (std::is_same_v<Record, typename Backend::CombinedUpdate>) backend.require_state(v);
}

// How an operand of a kind comes: a list as a tensor of addresses, a number as itself.
template <class Kind>
struct Passed {
  using type = Tensor;
};
template <>
struct Passed<int> {
  using type = int64_t;
};
template <>
struct Passed<bool> {
  using type = bool;
};

#define GAM_PARAMETER(Kind, name) , typename Passed<typename Backend::Kind>::type name
#define GAM_TAKE(Kind, name) v.name = backend.take_##Kind(#name, name);
#define GAM_OPERATOR(Name, function, operator_, FIELDS)                                                            \
  template <class Backend>                                                                                         \
  void function(Tensor layout, Tensor map, Tensor workspace, int64_t chunk, int64_t dtype FIELDS(GAM_PARAMETER)) { \
    Backend backend(layout, map, workspace, chunk, dtype);                                                         \
    typename Backend::Name v;                                                                                      \
    v.layout = backend.layout();                                                                                   \
    FIELDS(GAM_TAKE)                                                                                               \
    check_together(backend, v);                                                                                    \
    backend.run(v);                                                                                                \
  }
GAM_EACH_KERNEL(GAM_OPERATOR)
#undef GAM_OPERATOR
#undef GAM_TAKE
#undef GAM_PARAMETER

template <class Backend, class Library>
void register_operators(Library& m) {
#define GAM_REGISTER(Name, function, operator_, FIELDS) m.impl(operator_, TORCH_BOX((&function<Backend>)));
  GAM_EACH_KERNEL(GAM_REGISTER)
#undef GAM_REGISTER
}

}  // namespace gam
