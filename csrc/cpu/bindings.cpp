// The CPU backend: the kernels for this processor, and how operands reach them.
#include <stdlib.h>

#include "../operators.h"
#include "../stamp.h"
#include "operands.h"

#ifndef GAM_LIBRARY  // the namespace of its operators
#define GAM_LIBRARY gam_fused
#endif

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
    // What the units say after `target`; F16C, which compilers cannot ask for, is older than AVX2.
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx2 && avx512 && isa != "avx2") return avx512_kernels;
    if (avx2) return avx2_kernels;
#endif
    return baseline_kernels;
  }();
  return chosen;
}

// torch's thread pool, so that torch.set_num_threads is honoured.
void parallel_for(int64_t count, int64_t grain, Body body, void* context) {
  torch::stable::parallel_for(0, count, grain, [=](int64_t begin, int64_t end) { body(begin, end, context); });
}

class CpuBackend : public Arguments<CpuBackend>, public Operands<Layout, AddressRow> {
 public:
  static constexpr bool ON_CPU = true;
  using Arguments<CpuBackend>::Arguments;

  Layout layout() const { return {starts(), groups(), counted(), tensors(), chunk(), workspace()}; }
  static AddressRow list(const Addresses& addresses) { return addresses.host; }
  static bool used(AddressRow list) { return list != nullptr; }

#define GAM_RUN(Name, function, operator_, FIELDS) \
  void run(const Name& v) const { kernels().function(static_cast<int>(dtype()), v, parallel_for); }
  GAM_EACH_KERNEL(GAM_RUN)
#undef GAM_RUN

  // State that the update will write must be there.
  void require_state(const CombinedUpdate& v) const {
    auto present = [](AddressRow list, int64_t i) { return list && list[i]; };
    for (int64_t i = 0; i < tensors(); ++i) {
      if (!present(v.g1, i) && !present(v.last, i) && !present(v.folded, i)) continue;
      require("steps", v.steps, i);
      if (v.algorithm != Algorithm::ADAM) continue;
      require("state1", v.state1, i);
      require("state2", v.state2, i);
      const double* row = v.coefficients + groups()[i] * COLUMNS;
      if (static_cast<int>(row[Column::FLAGS]) & Flag::AMSGRAD) require("state3", v.state3, i);
    }
  }
};

}  // namespace
}  // namespace gam

STABLE_TORCH_LIBRARY_IMPL(GAM_LIBRARY, CPU, m) { gam::register_operators<gam::CpuBackend>(m); }
