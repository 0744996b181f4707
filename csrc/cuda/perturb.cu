#include "launch.cuh"
#include "perturb.cuh"

namespace gam {

const char* run(int dtype, const Perturb& v, const Words& words, void* stream) {
  using Lists = PerturbLists;
  return for_dtype(dtype, [&](auto storage) {
    return for_set<Lists::BACKUP, Lists::BASE | Lists::Y, Lists::FOLDED, Lists::ALL>(Lists::of(v), [&](auto set) {
      return launch<Perturb, perturb<decltype(storage), set.LISTS>>(v, v.layout.chunks, words, stream);
    });
  });
}

}  // namespace gam
