// Operands as the CUDA kernels take them, and their launchers. No torch, no CUDA header.
//
// A list is a row of addresses, one per tensor, 0 where a tensor is missing. Rows that last from step to step lie on
// the device; those of gradients, new in every pass, travel in the launch's own arguments ("words").
#pragma once

#include "../operands.h"

namespace gam {

// T tensors as one flat vector, cut into chunks. Its numbers, as `Layout.on` (gam_fused/backends/tensor_lists.py)
// orders them, lie at `map`, or in the words from `word` on.
struct Layout {
  const int64_t* map;
  int32_t word;
  int32_t tensors, chunks, groups;
  int64_t chunk;
  double* workspace;
};

// Addresses at `table`, or in the words from `word` on; neither (nullptr, -1) where the list is not used.
struct List {
  const int64_t* table;
  int32_t word;
};

static inline bool is_used(const List& list) { return list.table || list.word >= 0; }

#define GAM_USING(Name, function, operator_, FIELDS) using Name = Operands<Layout, List>::Name;
GAM_EACH_KERNEL(GAM_USING)
#undef GAM_USING

// What a launch can carry: kernel arguments hold 4 KB everywhere, and 32,764 bytes from CUDA 12.1 on.
constexpr int FEW_WORDS = 440, MANY_WORDS = 4000;

// The words of a launch, on the host; or, where they are more than a launch carries, already on the device.
struct Words {
  const int64_t* host;
  int32_t count;
  const int64_t* device;
};

// Each launches one kernel on `stream` (a cudaStream_t) of the current device. Returns nullptr, or what went wrong.
// `dtype` is a DType.
#define GAM_RUN(Name, function, operator_, FIELDS) \
  const char* run(int dtype, const Name& v, const Words& words, void* stream);
GAM_EACH_KERNEL(GAM_RUN)
#undef GAM_RUN

// target[i] <- words.host[i], for at most `max_words()` words: tables on the device without a copy that waits for the
// host.
const char* write_words(int64_t* target, const Words& words, void* stream);

// Words a launch can carry with this toolkit.
int max_words();

}  // namespace gam
