// The CPU room: the kernels for this processor, and how operands reach them.
#include <stdlib.h>

#include "../operators.h"
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

class CpuRoom : public Operands<CpuRoom>, public Verbs<Layout, Addresses> {
 public:
  static constexpr bool ON_CPU = true;
  using Operands<CpuRoom>::Operands;

  Layout layout() const { return {starts(), groups(), counted(), tensors(), chunk()}; }
  static Addresses list(const Operand& operand) { return operand.host; }
  static bool used(Addresses list) { return list != nullptr; }

  void run(const SquaredNorm& v) const { kernels().squared_norm(code(), v, parallel_for); }
  void run(const DirectionProducts& v) const { kernels().direction_products(code(), v, parallel_for); }
  void run(const Perturb& v) const { kernels().perturb(code(), v, parallel_for); }
  void run(const CombinedUpdate& v) const { kernels().combined_update(code(), v, parallel_for); }
  void run(const Combine& v) const { kernels().combine(code(), v, parallel_for); }
  void run(const Restore& v) const { kernels().restore(code(), v, parallel_for); }

  // State that the update will write must be there.
  void require_state(const CombinedUpdate& v) const {
    auto present = [](Addresses list, int64_t i) { return list && list[i]; };
    for (int64_t i = 0; i < tensors(); ++i) {
      if (!present(v.x1, i) && !present(v.x3, i) && !present(v.acc, i)) continue;
      require("steps", v.steps, i);
      if (v.algorithm != Algorithm::ADAM) continue;
      require("first", v.first, i);
      require("second", v.second, i);
      const double* row = v.coefficients + groups()[i] * COLUMNS;
      if (static_cast<int>(row[Column::FLAGS]) & Flag::AMSGRAD) require("third", v.third, i);
    }
  }

 private:
  int code() const { return static_cast<int>(dtype()); }
};

}  // namespace
}  // namespace gam

STABLE_TORCH_LIBRARY_IMPL(gam_fused, CPU, m) { gam::register_verbs<gam::CpuRoom>(m); }
