#include "direction_products.cuh"
#include "launch.cuh"

namespace gam {

const char* run(int dtype, const DirectionProducts& v, const Words& words, void* stream) {
  return for_dtype(dtype, [&](auto storage) {
    using S = decltype(storage);
    using Record = DirectionProducts;
    if (v.partials.rows == 6) return launch<Record, direction_products<S, true>>(v, v.layout.chunks, words, stream);
    return launch<Record, direction_products<S, false>>(v, v.layout.chunks, words, stream);
  });
}

}  // namespace gam
