#include "combine.cuh"
#include "launch.cuh"

namespace gam {

const char* run(int dtype, const Combine& v, const Words& words, void* stream) {
  return for_dtype(dtype, [&](auto storage) {
    return launch<Combine, combine<decltype(storage)>>(v, v.layout.chunks, words, stream);
  });
}

}  // namespace gam
