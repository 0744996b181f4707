#include "launch.cuh"
#include "perturb.cuh"

namespace gam {

const char* run(int dtype, const Perturb& v, const Words& words, void* stream) {
  return for_dtype(dtype, [&](auto storage) {
    return launch<Perturb, perturb<decltype(storage)>>(v, v.layout.chunks, words, stream);
  });
}

}  // namespace gam
