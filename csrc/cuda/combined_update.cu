#include "combined_update.cuh"
#include "launch.cuh"

namespace gam {

const char* run(int dtype, const CombinedUpdate& v, const Words& words, void* stream) {
  return for_dtype(dtype, [&](auto storage) {
    using S = decltype(storage);
    using Record = CombinedUpdate;
    constexpr int RESIDENT_UPDATE = sizeof(S) == 8 ? RESIDENT / 2 : RESIDENT;  // Adam in double needs more registers
    if (v.algorithm == Algorithm::SGD)
      return launch<Record, combined_update<S, Algorithm::SGD, false>>(v, v.layout.chunks, words, stream);
    const bool maximum = v.state3.table || v.state3.word >= 0;
    return maximum ? launch<Record, combined_update<S, Algorithm::ADAM, true>, RESIDENT_UPDATE>(v, v.layout.chunks,
                                                                                                words, stream)
                   : launch<Record, combined_update<S, Algorithm::ADAM, false>, RESIDENT_UPDATE>(v, v.layout.chunks,
                                                                                                 words, stream);
  });
}

}  // namespace gam
