// Sums in double, in an order that depends on element positions only; a reduction ends in the kernel that makes it.
#pragma once

#include "walk.cuh"

namespace gam {

// sum + a * b; fused, since double arithmetic is slow on many GPUs.
template <class C>
__device__ __forceinline__ double add_product(double sum, C a, C b) {
  return fma(double(a), double(b), sum);
}

// sum + the products of `a` and `b`, which a lane has taken of vectors in S. Those of 16-bit types are summed in float,
// as one conversion to double for each of so many elements would be slow; in double where a float cannot hold them.
template <class S, class C, int COUNT>
__device__ __forceinline__ double add_products(double sum, const C (&a)[COUNT], const C (&b)[COUNT]) {
  if constexpr (sizeof(S) == 2 && COUNT > 1) {
    float aa = 0.0f, ab = 0.0f, bb = 0.0f;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      aa = fmaf(a[i], a[i], aa);
      ab = fmaf(a[i], b[i], ab);
      bb = fmaf(b[i], b[i], bb);
    }
    constexpr float LEAST = 1e-30f, MOST = 3e38f;
    if (aa >= LEAST && aa <= MOST && bb >= LEAST && bb <= MOST) return sum + double(ab);
  }
#pragma unroll
  for (int i = 0; i < COUNT; ++i) sum = add_product(sum, a[i], b[i]);
  return sum;
}

// The sum over the lanes of a warp, in a fixed order.
__device__ __forceinline__ double warp_sum(double value) {
#pragma unroll
  for (int offset = WARP / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, offset);
  return value;
}

// target[row * target_stride] <- the sum of source[row * stride + i] over i < count; a warp for each row.
template <int ROWS>
__device__ __forceinline__ void sum_rows(double* target, int64_t target_stride, const double* source, int64_t stride,
                                         int count) {
  const int lane = threadIdx.x % WARP;
#pragma unroll 1
  for (int row = threadIdx.x / WARP; row < ROWS; row += WARPS) {
    double total = 0.0;
    for (int i = lane; i < count; i += WARP) total += __ldcg(source + row * stride + i);
    total = warp_sum(total);
    if (lane == 0) target[row * target_stride] = total;
  }
}

// Whether this block is the last of `count` to come here: then it sees what all of them wrote before. Leaves the ticket
// at 0 for the next kernel.
__device__ __forceinline__ bool is_last(double* ticket, unsigned int count) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    unsigned int* drawn = reinterpret_cast<unsigned int*>(ticket);
    last = atomicAdd(drawn, 1u) == count - 1;
    if (last) *drawn = 0u;
    __threadfence();
  }
  __syncthreads();
  return last;
}

// out[row] <- the sum over all chunks of the sum of their threads' `values`: of groups of chunks first, each by the
// last block of the group, then of the groups. Whether this block is the last of all.
template <int ROWS>
__device__ __forceinline__ bool finish_sums(const Matrix& out, const double (&values)[ROWS], int chunk,
                                            const Layout& layout) {
  __shared__ double of_warps[WARPS][ROWS];
  const int chunks = layout.chunks, groups = layout.groups, group = chunk / GROUP;
  double* const tickets = layout.workspace;
  double* const of_chunks = tickets + groups + 1;
  double* const of_groups = of_chunks + ROWS * chunks;
  const int first = group * GROUP, members = chunks - first < GROUP ? chunks - first : GROUP;
#pragma unroll
  for (int row = 0; row < ROWS; ++row) {
    const double sum = warp_sum(values[row]);
    if (threadIdx.x % WARP == 0) of_warps[threadIdx.x / WARP][row] = sum;
  }
  __syncthreads();
  if (threadIdx.x < ROWS) {
    double sum = of_warps[0][threadIdx.x];
#pragma unroll
    for (int warp = 1; warp < WARPS; ++warp) sum += of_warps[warp][threadIdx.x];
    of_chunks[threadIdx.x * int64_t(chunks) + chunk] = sum;
  }
  if (!is_last(tickets + group, members)) return false;
  sum_rows<ROWS>(of_groups + group, groups, of_chunks + first, chunks, members);
  if (!is_last(tickets + groups, groups)) return false;
  sum_rows<ROWS>(out.data, out.stride, of_groups, groups, groups);
  return true;
}

// total[row] = the sum over all blocks of tensors, a column of each: few numbers, which every thread reads.
template <int ROWS>
__device__ __forceinline__ void row_totals(const Matrix& partials, double (&total)[ROWS]) {
#pragma unroll
  for (int row = 0; row < ROWS; ++row) {
    total[row] = 0.0;
    for (int64_t i = 0; i < partials.columns; ++i) total[row] += partials.data[row * partials.stride + i];
  }
}

}  // namespace gam
