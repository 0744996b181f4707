// Launches: one entry for every kernel, arguments with space for few or many words, a kernel for all dtypes.
#pragma once

#include <string.h>

#include "walk.cuh"

namespace gam {

template <class Record, int WORDS>
struct LaunchArguments {
  Record record;
  const int64_t* words_elsewhere;
  int64_t words[WORDS];
};

template <class Record, int WORDS, void (*BODY)(const Record&, const int64_t*), int BLOCKS>
__global__ void __launch_bounds__(THREADS, BLOCKS)
    entry(const __grid_constant__ LaunchArguments<Record, WORDS> arguments) {
  BODY(arguments.record, arguments.words_elsewhere ? arguments.words_elsewhere : arguments.words);
}

template <class Record, int WORDS, void (*BODY)(const Record&, const int64_t*), int BLOCKS>
const char* launch_with(const Record& record, unsigned int blocks, const Words& words, void* stream) {
  using A = LaunchArguments<Record, WORDS>;
  static_assert(sizeof(A) <= (WORDS > FEW_WORDS ? 32764 : 4096), "more arguments than a kernel takes");
  A arguments;
  arguments.record = record;
  arguments.words_elsewhere = words.device;
  if (!words.device) memcpy(arguments.words, words.host, words.count * sizeof(int64_t));
  void* pointers[] = {&arguments};
  cudaLaunchKernel(entry<Record, WORDS, BODY, BLOCKS>, dim3(blocks), dim3(THREADS), pointers, 0,
                   static_cast<cudaStream_t>(stream));
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// BLOCKS: how many blocks shall be resident on a multiprocessor.
template <class Record, void (*BODY)(const Record&, const int64_t*), int BLOCKS = RESIDENT>
const char* launch(const Record& record, unsigned int blocks, const Words& words, void* stream) {
#ifdef GAM_MANY_WORDS
  if (!words.device && words.count > FEW_WORDS)
    return launch_with<Record, MANY_WORDS, BODY, BLOCKS>(record, blocks, words, stream);
#endif
  return launch_with<Record, FEW_WORDS, BODY, BLOCKS>(record, blocks, words, stream);
}

// A set of operands that are there, by which a kernel is compiled: without branches on those that are not.
template <unsigned SET>
struct Set {
  static constexpr unsigned LISTS = SET;
};

// pick(Set<...>{}) for `lists`, if it is among these sets, and else for the last of them, which has all lists.
template <unsigned SET, unsigned... OTHERS, class Pick>
const char* for_set(unsigned lists, Pick pick) {
  if constexpr (sizeof...(OTHERS) > 0) {
    if (lists != SET) return for_set<OTHERS...>(lists, pick);
  }
  return pick(Set<SET>{});
}

// pick(S{}) with the storage type S of `dtype`, a DType.
template <class Pick>
const char* for_dtype(int dtype, Pick pick) {
  switch (dtype) {
    case DType::FLOAT32:
      return pick(float{});
    case DType::FLOAT64:
      return pick(double{});
    case DType::BFLOAT16:
      return pick(BFloat16{});
    case DType::FLOAT16:
      return pick(Float16{});
  }
  return "unknown dtype";
}

}  // namespace gam
