// The CPU room's operators: schemas are in gam_fused/ops.py, kernels in the other files of this folder.
//
// Each verb is one template; List is `Tensors` for the default overload and `Tensor` for the overload `addresses`.
#include <stdlib.h>

#include "../arguments.h"
#include "verbs.h"

namespace gam {
namespace {

// The kernels for this processor; GAM_FUSED_ISA=baseline or avx2 asks for less than it has.
const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
#ifdef GAM_X86
    const char* wish = getenv("GAM_FUSED_ISA");
    const std::string isa = wish ? wish : "";
    if (isa == "baseline") return baseline_kernels;
    __builtin_cpu_init();
    if (isa != "avx2" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      return avx512_kernels;
    if (__builtin_cpu_supports("avx2")) return avx2_kernels;
#endif
    return baseline_kernels;
  }();
  return chosen;
}

// torch's thread pool, so that torch.set_num_threads is honoured.
void parallel_for(int64_t count, int64_t grain, Body body, void* context) {
  torch::stable::parallel_for(0, count, grain, [=](int64_t begin, int64_t end) { body(begin, end, context); });
}

Layout layout_of(const Lists& lists, int64_t chunk) {
  return {lists.starts(), lists.groups(), lists.counted(), lists.tensors(), chunk};
}

int64_t chunks_of(const Lists& lists, int64_t chunk) {
  return std::max<int64_t>(1, (lists.starts()[lists.tensors()] + chunk - 1) / chunk);
}

// float64 partial sums: [rows, columns], or [columns], with unit stride and at least `columns` columns.
Matrix sums(const char* name, const Tensor& t, int64_t columns) {
  double* data = float64(name, t, true);
  const int64_t last = t.dim() - 1;
  STD_TORCH_CHECK((last == 0 || last == 1) && t.size(last) >= columns && (t.size(last) == 1 || t.stride(last) == 1),
                  "gam_fused: ", name, " must have at least ", columns, " columns of unit stride, got ", describe(t));
  return {data, last ? t.size(0) : 1, t.size(last), last ? t.stride(0) : 0};
}

Matrix sums(const char* name, const Tensor& t, int64_t columns, std::initializer_list<int64_t> rows) {
  Matrix m = sums(name, t, columns);
  STD_TORCH_CHECK(std::find(rows.begin(), rows.end(), m.rows) != rows.end(), "gam_fused: ", name, " must have ",
                  *rows.begin(), " rows", rows.size() > 1 ? " (or 6, see the verb)" : "", ", got ", describe(t));
  return m;
}

void require_list(const char* name, Addresses list, const Lists& lists) {
  STD_TORCH_CHECK(list || lists.tensors() == 0, "gam_fused: ", name, " must not be an empty list");
}

template <class List>
void squared_norm(const Tensor layout, int64_t chunk, int64_t dtype, const List x, const List y, const List weight,
                  const Tensor partials) {
  Lists lists(layout, chunk, dtype, true);
  kernels().squared_norm(static_cast<int>(dtype),
                         {layout_of(lists, chunk), lists.storage("x", x), lists.storage("y", y),
                          lists.storage("weight", weight), sums("partials", partials, chunks_of(lists, chunk), {2})},
                         parallel_for);
}

template <class List>
void direction_products(const Tensor layout, int64_t chunk, int64_t dtype, const List x1, const List x3, const List acc,
                        const Tensor coefficients_, const Tensor partials) {
  Lists lists(layout, chunk, dtype, true);
  DirectionProducts v = {layout_of(lists, chunk),
                         lists.storage("x1", x1),
                         lists.storage("x3", x3),
                         lists.compute("acc", acc),
                         coefficients(coefficients_, lists, true),
                         {}};
  v.partials = sums("partials", partials, chunks_of(lists, chunk), {v.x1 ? 6 : 2});
  kernels().direction_products(static_cast<int>(dtype), v, parallel_for);
}

template <class List>
void perturb(const Tensor layout, int64_t chunk, int64_t dtype, const List theta, const List base, const List x,
             const List y, const List acc, const List backup, const Tensor coefficients_, const Tensor partials,
             const Tensor control, const Tensor realised, int64_t ascent, bool adaptive) {
  STD_TORCH_CHECK(ascent >= 0 && ascent <= 2, "gam_fused: ascent must be 0, 1 or 2, got ", ascent);
  Lists lists(layout, chunk, dtype, true);
  Perturb v = {layout_of(lists, chunk),
               lists.complete("theta", theta),
               lists.complete("base", base),
               lists.storage("x", x),
               lists.storage("y", y),
               lists.compute("acc", acc),
               lists.complete("backup", backup),
               coefficients(coefficients_, lists, true),
               sums("partials", partials, 1, {2}),
               control_block(control, true),
               sums("realised", realised, chunks_of(lists, chunk), {1}),
               static_cast<int>(ascent),
               adaptive};
  require_list("theta", v.theta, lists);
  kernels().perturb(static_cast<int>(dtype), v, parallel_for);
}

// State that the update will write must be there.
void require_state(const Lists& lists, const CombinedUpdate& v) {
  auto present = [](Addresses list, int64_t i) { return list && list[i]; };
  for (int64_t i = 0; i < lists.tensors(); ++i) {
    if (!present(v.x1, i) && !present(v.x3, i) && !present(v.acc, i)) continue;
    lists.require("steps", v.steps, i);
    if (v.algorithm != Algorithm::ADAM) continue;
    lists.require("first", v.first, i);
    lists.require("second", v.second, i);
    const double* row = v.coefficients + lists.groups()[i] * COLUMNS;
    if (static_cast<int>(row[Column::FLAGS]) & Flag::AMSGRAD) lists.require("third", v.third, i);
  }
}

template <class List>
void combined_update(const Tensor layout, int64_t chunk, int64_t dtype, const List theta, const List backup,
                     const List x1, const List x3, const List acc, const List first, const List second,
                     const List third, const List steps, const Tensor coefficients_, const Tensor partials,
                     const Tensor control, const Tensor direction, int64_t algorithm) {
  Lists lists(layout, chunk, dtype, true);
  CombinedUpdate v = {layout_of(lists, chunk),
                      lists.complete("theta", theta),
                      lists.complete("backup", backup),
                      lists.storage("x1", x1),
                      lists.storage("x3", x3),
                      lists.compute("acc", acc),
                      lists.storage("first", first),
                      lists.storage("second", second),
                      lists.storage("third", third),
                      lists.counters("steps", steps),
                      coefficients(coefficients_, lists, true),
                      sums("partials", partials, 1, {2, 6}),
                      control_block(control, true),
                      sums("direction", direction, chunks_of(lists, chunk), {1}),
                      static_cast<int>(algorithm)};
  STD_TORCH_CHECK(algorithm == Algorithm::SGD || algorithm == Algorithm::ADAM, "gam_fused: unknown algorithm ",
                  algorithm);
  require_list("theta", v.theta, lists);
  require_state(lists, v);
  kernels().combined_update(static_cast<int>(dtype), v, parallel_for);
}

template <class List>
void combine(const Tensor layout, int64_t chunk, int64_t dtype, const List out, const List x1, const List x3,
             const List acc, const Tensor coefficients_, const Tensor partials, const Tensor control,
             const Tensor direction) {
  Lists lists(layout, chunk, dtype, true);
  kernels().combine(
      static_cast<int>(dtype),
      {layout_of(lists, chunk), lists.storage("out", out), lists.storage("x1", x1), lists.storage("x3", x3),
       lists.compute("acc", acc), coefficients(coefficients_, lists, true), sums("partials", partials, 1, {2, 6}),
       control_block(control, true), sums("direction", direction, chunks_of(lists, chunk), {1})},
      parallel_for);
}

template <class List>
void restore(const Tensor layout, int64_t chunk, int64_t dtype, const List theta, const List backup) {
  Lists lists(layout, chunk, dtype, true);
  Restore v = {layout_of(lists, chunk), lists.complete("theta", theta), lists.complete("backup", backup)};
  require_list("theta", v.theta, lists);
  require_list("backup", v.backup, lists);
  kernels().restore(static_cast<int>(dtype), v, parallel_for);
}

}  // namespace
}  // namespace gam

STABLE_TORCH_LIBRARY_IMPL(gam_fused, CPU, m) {
  using gam::Tensor;
  using gam::Tensors;
  m.impl("squared_norm", TORCH_BOX(&gam::squared_norm<Tensors>));
  m.impl("squared_norm.addresses", TORCH_BOX(&gam::squared_norm<Tensor>));
  m.impl("direction_products", TORCH_BOX(&gam::direction_products<Tensors>));
  m.impl("direction_products.addresses", TORCH_BOX(&gam::direction_products<Tensor>));
  m.impl("perturb_", TORCH_BOX(&gam::perturb<Tensors>));
  m.impl("perturb_.addresses", TORCH_BOX(&gam::perturb<Tensor>));
  m.impl("combined_update_", TORCH_BOX(&gam::combined_update<Tensors>));
  m.impl("combined_update_.addresses", TORCH_BOX(&gam::combined_update<Tensor>));
  m.impl("combine_", TORCH_BOX(&gam::combine<Tensors>));
  m.impl("combine_.addresses", TORCH_BOX(&gam::combine<Tensor>));
  m.impl("restore_", TORCH_BOX(&gam::restore<Tensors>));
  m.impl("restore_.addresses", TORCH_BOX(&gam::restore<Tensor>));
}
