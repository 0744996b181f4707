// CUDA's device language for a host compiler, as far as csrc/cuda uses it: every thread of a block is a fiber, barriers
// and shuffles hand over to the next one. For tests: it checks addresses, barriers and arithmetic, not concurrency or
// speed.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define __global__
#define __device__
#define __shared__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned int x, y, z;
  dim3(unsigned int count = 1) : x(count), y(1), z(1) {}
};

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

struct alignas(8) uint2 {
  uint32_t x, y;
};

extern thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace shim {

// Runs thread(context) once for each of `threads` fibers, until all have returned.
void run_block(unsigned int threads, void (*thread)(void*), void* context);

extern unsigned int first_block, most_blocks;  // of a grid, those that are run

void wait_for_block();
void wait_for_warp();

// The value of another lane of the warp; both have to ask.
void exchange(void* value, size_t size, unsigned int other_lane);

}  // namespace shim

inline void __syncthreads() { shim::wait_for_block(); }
inline void __syncwarp() { shim::wait_for_warp(); }
inline void __threadfence() {}

template <class T>
T __shfl_xor_sync(unsigned int, T value, int mask) {
  shim::exchange(&value, sizeof(T), (threadIdx.x % 32) ^ static_cast<unsigned int>(mask));
  return value;
}

// The last lanes of a warp keep their own.
template <class T>
T __shfl_down_sync(unsigned int, T value, unsigned int distance) {
  const unsigned int lane = threadIdx.x % 32;
  shim::exchange(&value, sizeof(T), lane + distance < 32 ? lane + distance : lane);
  return value;
}

// The lower word of the two, `high` above `low`, shifted to the right.
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (shift % 32));
}

inline unsigned int atomicAdd(unsigned int* counter, unsigned int value) {
  const unsigned int old = *counter;
  *counter += value;
  return old;
}

template <class T>
T __ldcg(const T* from) {
  return *from;
}

template <class T>
void __stcg(T* to, T value) {
  *to = value;
}

template <class T>
void __stcs(T* to, T value) {
  *to = value;
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorLaunchFailure };

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "error"; }

template <class Arguments>
void cudaLaunchKernel(void (*kernel)(Arguments), dim3 grid, dim3 block, void** pointers, size_t, cudaStream_t) {
  struct Call {
    void (*kernel)(Arguments);
    Arguments* arguments;
  } call = {kernel, static_cast<Arguments*>(pointers[0])};
  gridDim = grid;
  blockDim = block;
  blockIdx = dim3(shim::first_block < grid.x ? shim::first_block : grid.x - 1);
  for (unsigned int i = 0; blockIdx.x < grid.x && i < shim::most_blocks; ++blockIdx.x, ++i)
    shim::run_block(block.x, [](void* p) { static_cast<Call*>(p)->kernel(*static_cast<Call*>(p)->arguments); }, &call);
}
