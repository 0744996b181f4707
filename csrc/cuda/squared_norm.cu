#include "launch.cuh"
#include "squared_norm.cuh"

namespace gam {

const char* run(int dtype, const SquaredNorm& v, const Words& words, void* stream) {
  using Lists = NormLists;
  return for_dtype(dtype, [&](auto storage) {
    return for_set<0, Lists::Y, Lists::ALL>(Lists::of(v), [&](auto set) {
      return launch<SquaredNorm, squared_norm<decltype(storage), set.LISTS>>(v, v.layout.chunks, words, stream);
    });
  });
}

}  // namespace gam
