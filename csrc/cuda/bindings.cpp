// The CUDA backend: how operands reach the kernels. Torch is known here, the math is not.
#include "../operators.h"
#include "../stamp.h"
#include "operands.h"

#ifdef USE_CUDA
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#define GAM_DISPATCH CUDA
#endif

namespace gam {
namespace {

#ifdef USE_CUDA
// Makes the device of the lists the current one, while it lives.
struct Device {
  torch::stable::accelerator::DeviceGuard guard;
  void* stream = nullptr;
  explicit Device(int32_t index) : guard(index) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
  }
};
#else
// Kernels that run on the CPU, in tests.
struct Device {
  void* stream = nullptr;
  explicit Device(int32_t) {}
};
#endif

class CudaBackend : public Arguments<CudaBackend>, public Operands<Layout, List> {
 public:
#ifdef USE_CUDA
  static constexpr bool ON_CPU = false;
#else
  static constexpr bool ON_CPU = true;
#endif
  using Arguments<CudaBackend>::Arguments;

  Layout layout() {
    const int32_t groups = static_cast<int32_t>(group_count(chunks()));
    Layout result = {map(),   -1,         static_cast<int32_t>(tensors()), static_cast<int32_t>(chunks()), groups,
                     chunk(), workspace()};
    if (result.map) return result;
    result.word = static_cast<int32_t>(words_.size());
    words_.insert(words_.end(), starts(), starts() + 3 * (tensors() + 1));
    for (int64_t i = 0, tensor = 0; i < chunks(); ++i) {
      while (tensor + 1 < tensors() && starts()[tensor + 1] <= i * chunk()) ++tensor;
      words_.push_back(tensor);
    }
    return result;
  }

  List list(const Addresses& addresses) {
    if (addresses.device) return {addresses.device, -1};
    if (!addresses.host) return {nullptr, -1};
    const int32_t word = static_cast<int32_t>(words_.size());
    words_.insert(words_.end(), addresses.host, addresses.host + tensors());
    return {nullptr, word};
  }

  static bool used(const List& list) { return is_used(list); }

  // State that the update will write must be there, as far as the host can see.
  void require_state(const CombinedUpdate& v) const {
    STD_TORCH_CHECK(used(v.steps) || tensors() == 0, "gam_fused: steps must not be an empty list");
    STD_TORCH_CHECK(v.algorithm != Algorithm::ADAM || (used(v.state1) && used(v.state2)) || tensors() == 0,
                    "gam_fused: Adam needs the lists state1 and state2");
  }

  template <class Record>
  void run(const Record& v) {
    if (tensors() == 0 && device() < 0 && !ON_CPU) return;
    Device there(device());
    Words words = {words_.data(), static_cast<int32_t>(words_.size()), nullptr};
    Tensor table;  // freed after the launch, on whose stream its memory is used again
    if (words.count > max_words()) {
      table = on_device(there.stream);
      words = {nullptr, words.count, static_cast<const int64_t*>(table.const_data_ptr())};
    }
    check(gam::run(static_cast<int>(dtype()), v, words, there.stream));
  }

 private:
  // All words, as several launches carry them.
  Tensor on_device(void* stream) const {
    const int64_t count = static_cast<int64_t>(words_.size());
    Tensor table = torch::stable::new_empty(like(), {count}, ScalarType::Long);
    int64_t* target = static_cast<int64_t*>(table.mutable_data_ptr());
    for (int64_t i = 0; i < count; i += max_words()) {
      const int32_t part = static_cast<int32_t>(std::min<int64_t>(max_words(), count - i));
      check(write_words(target + i, {words_.data() + i, part, nullptr}, stream));
    }
    return table;
  }

  void check(const char* error) const {
    STD_TORCH_CHECK(
        !error, "gam_fused: a CUDA kernel could not be launched: ", error,
        "; if it names no kernel image, rebuild with TORCH_CUDA_ARCH_LIST set to this device's architecture");
  }

  std::vector<int64_t> words_;
};

}  // namespace
}  // namespace gam

STABLE_TORCH_LIBRARY_IMPL(GAM_LIBRARY, GAM_DISPATCH, m) { gam::register_operators<gam::CudaBackend>(m); }
