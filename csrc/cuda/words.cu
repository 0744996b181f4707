// Words onto the device by a kernel's arguments: unlike a copy from pageable memory it never waits for the host, and
// unlike one from pinned memory it can be captured in a CUDA graph.
#include "launch.cuh"

namespace gam {
namespace {

struct WriteWords {
  int64_t* target;
  int32_t count;
};

__device__ __forceinline__ void write(const WriteWords& v, const int64_t* words) {
  for (int i = threadIdx.x; i < v.count; i += THREADS) v.target[i] = words[i];
}

}  // namespace

const char* write_words(int64_t* target, const Words& words, void* stream) {
  return launch<WriteWords, write>({target, words.count}, 1, words, stream);
}

int max_words() {
#ifdef GAM_MANY_WORDS
  return MANY_WORDS;
#else
  return FEW_WORDS;
#endif
}

}  // namespace gam
