#include "launch.cuh"
#include "squared_norm.cuh"

namespace gam {

const char* run(int dtype, const SquaredNorm& v, const Words& words, void* stream) {
  return for_dtype(dtype, [&](auto storage) {
    return launch<SquaredNorm, squared_norm<decltype(storage)>>(v, v.layout.chunks, words, stream);
  });
}

}  // namespace gam
