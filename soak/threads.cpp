// The operators of csrc/cpu over plain threads instead of torch's pool, whose synchronisation the thread sanitizer
// cannot see. Made anew in every launch, so that all that a kernel writes is handed over by their beginning and end
// alone.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <thread>
#include <vector>

namespace torch::stable {

template <class Part>
void on_threads(int64_t begin, int64_t end, int64_t, Part part) {
  const int64_t share = (end - begin + 3) / 4;
  std::vector<std::thread> threads;
  for (int64_t first = begin; first < end; first += share) {
    threads.emplace_back([=] { part(first, first + share < end ? first + share : end); });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace torch::stable

#define parallel_for on_threads
#include "../csrc/cpu/bindings.cpp"
