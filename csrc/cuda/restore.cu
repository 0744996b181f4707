#include "launch.cuh"
#include "restore.cuh"

namespace gam {

const char* run(int dtype, const Restore& v, const Words& words, void* stream) {
  return for_dtype(dtype, [&](auto storage) {
    return launch<Restore, restore<decltype(storage)>>(v, v.layout.chunks, words, stream);
  });
}

}  // namespace gam
