#include "combined_update.cuh"
#include "launch.cuh"

namespace gam {
namespace {

using Lists = UpdateLists;

template <class S>
const char* run_sgd(const CombinedUpdate& v, const Words& words, void* stream) {
  constexpr unsigned MOMENTUM = Lists::STATE, AFTER_ASCENT = Lists::STATE | Lists::BACKUP;
  return for_set<MOMENTUM, AFTER_ASCENT, AFTER_ASCENT | Lists::FOLDED, Lists::ALL>(Lists::of(v), [&](auto set) {
    return launch<CombinedUpdate, combined_update<S, Algorithm::SGD, set.LISTS>>(v, v.layout.chunks, words, stream);
  });
}

template <class S>
const char* run_adam(const CombinedUpdate& v, const Words& words, void* stream) {
  constexpr int RESIDENT_UPDATE = sizeof(S) == 8 ? RESIDENT / 2 : RESIDENT - 1;  // it needs more registers
  constexpr unsigned AMSGRAD = Lists::ALL, OTHERWISE = Lists::ALL & ~unsigned(Lists::MAXIMUM);
  const unsigned lists = Lists::of(v) & Lists::MAXIMUM ? AMSGRAD : OTHERWISE;
  return for_set<OTHERWISE, AMSGRAD>(lists, [&](auto set) {
    return launch<CombinedUpdate, combined_update<S, Algorithm::ADAM, set.LISTS>, RESIDENT_UPDATE>(v, v.layout.chunks,
                                                                                                   words, stream);
  });
}

}  // namespace

const char* run(int dtype, const CombinedUpdate& v, const Words& words, void* stream) {
  return for_dtype(dtype, [&](auto storage) {
    using S = decltype(storage);
    return v.algorithm == Algorithm::SGD ? run_sgd<S>(v, words, stream) : run_adam<S>(v, words, stream);
  });
}

}  // namespace gam
