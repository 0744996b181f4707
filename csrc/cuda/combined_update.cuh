// Kernel `combined_update_`: the direction d, theta from its backup, and the base optimizer's update, in one pass.
#pragma once

#include "../math/adam.h"
#include "../math/sgd.h"
#include "combine.cuh"
#include "restore.cuh"

namespace gam {

// The base optimizer's scalars of one tensor, from its group and its count of steps.
template <class C, int ALGORITHM>
struct Scalars {
  int group;
  float step;
  Direction<C> k;
  Sgd<C> sgd;
  Adam<C> adam;

  __device__ bool serves(int other_group, float other_step) const { return group == other_group && step == other_step; }

  __device__ void prepare(const double* coefficients, int of_group, float of_step, DirectionScale scale) {
    const double* row = coefficients + of_group * COLUMNS;
    group = of_group;
    step = of_step;
    k = direction_of<C>(row, scale);
    if (ALGORITHM == Algorithm::SGD) sgd = sgd_of<C>(row, step);
    if (ALGORITHM == Algorithm::ADAM) adam = adam_of<C>(row, step);
  }
};

// MAXIMUM: whether any tensor has AMSGRAD's third state.
template <class S, int ALGORITHM, bool MAXIMUM>
struct UpdateSpan {
  using C = Compute<S>;
  template <int COUNT>
  using P = Pack<S, COUNT>;
  double& squares;  // sum of d^2
  Span span;
  Part<S> theta, from, g1, last, state1, state2, state3;
  Part<C> folded;
  const Scalars<C, ALGORITHM>* h;

  template <int COUNT, int STEPS>
  __device__ __forceinline__ void tile(int element) {
    P<COUNT> a[STEPS], b[STEPS], old[STEPS], state[STEPS][2];
    Pack<C, COUNT> c[STEPS];
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
      const int e = element + s * WARP * COUNT;
      load(a[s], g1, e);
      load(b[s], last, e);
      load(c[s], folded, e);
      load(old[s], from, e);
      load(state[s][0], state1, e);
      if (ALGORITHM == Algorithm::ADAM) load(state[s][1], state2, e);
    }
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
      const int e = element + s * WARP * COUNT;
#pragma unroll
      for (int i = 0; i < COUNT; ++i) {
        const C d = direction(h->k, a[s].get(i), b[s].get(i), c[s].get(i));
        squares = add_product(squares, d, d);
        c[s].set(i, d);
      }
      if constexpr (ALGORITHM == Algorithm::SGD)
        sgd_step(c[s], old[s], state[s][0], e);
      else
        adam_step(c[s], old[s], state[s][0], state[s][1], e);
      store(old[s], theta, e);
    }
  }

  template <int COUNT>
  __device__ __forceinline__ void sgd_step(const Pack<C, COUNT>& d, P<COUNT>& point, P<COUNT>& momentum_buffer, int e) {
    const bool momentum = bool(state1);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const C old = point.get(i);
      C moved = momentum_buffer.get(i);
      point.set(i, momentum ? sgd_momentum(h->sgd, old, d.get(i), moved) : sgd(h->sgd, old, d.get(i)));
      momentum_buffer.set(i, moved);
    }
    if (momentum) store(momentum_buffer, state1, e);
  }

  template <int COUNT>
  __device__ __forceinline__ void adam_step(const Pack<C, COUNT>& d, P<COUNT>& point, P<COUNT>& exp_avg,
                                            P<COUNT>& exp_avg_sq, int e) {
    if (MAXIMUM && state3) {
      P<COUNT> maximum;
      load(maximum, state3, e);
      adam_elements<true>(d, point, exp_avg, exp_avg_sq, maximum);
      store(maximum, state3, e);
    } else {
      P<COUNT> unused = {};
      adam_elements<false>(d, point, exp_avg, exp_avg_sq, unused);
    }
    store(exp_avg, state1, e);
    store(exp_avg_sq, state2, e);
  }

  template <bool AMSGRAD, int COUNT>
  __device__ __forceinline__ void adam_elements(const Pack<C, COUNT>& d, P<COUNT>& point, P<COUNT>& exp_avg,
                                                P<COUNT>& exp_avg_sq, P<COUNT>& maximum) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      C m = exp_avg.get(i), v = exp_avg_sq.get(i), w = AMSGRAD ? maximum.get(i) : C(0);
      point.set(i, adam<AMSGRAD>(h->adam, point.get(i), d.get(i), m, v, w));
      exp_avg.set(i, m);
      exp_avg_sq.set(i, v);
      if (AMSGRAD) maximum.set(i, w);
    }
  }
};

__device__ __forceinline__ bool is_updated(const CombinedUpdate& v, const int64_t* words, int tensor) {
  return address(v.g1, words, tensor) || address(v.last, words, tensor) || address(v.folded, words, tensor);
}

__device__ __forceinline__ float* step_of(const CombinedUpdate& v, const int64_t* words, int tensor) {
  return reinterpret_cast<float*>(address(v.steps, words, tensor));
}

// Chunks of one tensor all read its step: the last block to finish counts the steps.
__device__ __forceinline__ void count_steps(const CombinedUpdate& v, const int64_t* words) {
  __shared__ bool is_last;
  __syncthreads();
  if (threadIdx.x == 0) {
    unsigned int* ticket = reinterpret_cast<unsigned int*>(v.control + Control::TICKET);
    __threadfence();
    is_last = atomicAdd(ticket, 1u) == gridDim.x - 1;
    if (is_last) *ticket = 0u;
  }
  __syncthreads();
  if (!is_last) return;
  for (int i = threadIdx.x; i < v.layout.tensors; i += THREADS)
    if (is_updated(v, words, i)) *step_of(v, words, i) += 1.0f;
}

template <class S, int ALGORITHM, bool MAXIMUM>
__device__ __forceinline__ void combined_update(const CombinedUpdate& v, const int64_t* words) {
  using C = Compute<S>;
  // Adam keeps more of each element in registers than 16 bytes of the 16-bit types leave room for.
  constexpr int STEPS = 1, WIDTH = ALGORITHM == Algorithm::ADAM && sizeof(S) == 2 ? 4 : VECTOR<S>;
  __shared__ WarpSums<1> shared;
  __shared__ Slots<8> slots;
  __shared__ Scalars<C, ALGORITHM> scalars[1 + WARPS];  // of the chunk's first tensor; of another one, for each warp
  __shared__ DirectionScale scale;
  const Close close = close_step(v.partials, v.control, v.coefficients);
  const bool skip = close.skip;
  const Map map(v.layout, words);
  const int first_tensor = int(map.first_tensor(blockIdx.x));
  if (threadIdx.x == 0) scale = close.scale;
  if (threadIdx.x == 0 && first_tensor < v.layout.tensors) {
    const float* step = step_of(v, words, first_tensor);
    scalars[0].prepare(v.coefficients, int(map.group(first_tensor)), step ? *step + 1.0f : 0.0f, close.scale);
  }
  __syncthreads();
  const Scalars<C, ALGORITHM>* current = &scalars[0];
  double squares[1] = {};
  int turn = 0;
  for_each_span<S>(v.layout, map, [&](const Span& span) {
    if (skip || !is_updated(v, words, span.tensor)) {
      if (!address(v.backup, words, span.tensor)) return;
      Fetch fetch(slots, words, span);
      RestoreSpan<S> body{span, fetch.part<S>(v.theta), fetch.part<S>(v.backup)};
      for_each_element<WIDTH, STEPS>(span, turn, fetch.aligned(), body);
      return;
    }
    const int group = int(map.group(span.tensor));
    const float step = *step_of(v, words, span.tensor) + 1.0f;
    if (!current->serves(group, step)) {
      Scalars<C, ALGORITHM>* own = &scalars[1 + threadIdx.x / WARP];
      __syncwarp();
      if (threadIdx.x % WARP == 0) own->prepare(v.coefficients, group, step, scale);
      __syncwarp();
      current = own;
    }
    Fetch fetch(slots, words, span);
    UpdateSpan<S, ALGORITHM, MAXIMUM> body{squares[0]};
    body.span = span;
    body.theta = fetch.part<S>(v.theta);
    body.from = fetch.part<S>(v.backup, v.theta);
    body.g1 = fetch.part<S>(v.g1);
    body.last = fetch.part<S>(v.last);
    body.folded = fetch.part<C>(v.folded);
    body.state1 = fetch.part<S>(v.state1);
    body.state2 = fetch.part<S>(v.state2);
    body.state3 = fetch.part<S>(v.state3);
    body.h = current;
    for_each_element<WIDTH, STEPS>(span, turn, fetch.aligned(), body);
  });
  put_sums(v.direction, squares, shared);
  if (!skip) count_steps(v, words);
}

}  // namespace gam
