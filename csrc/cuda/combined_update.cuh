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

// Which of the operands are there that not every update has.
struct UpdateLists {
  enum : unsigned { BACKUP = 1, G1 = 2, FOLDED = 4, STATE = 8, MAXIMUM = 16, ALL = 31 };
  static unsigned of(const CombinedUpdate& v) {
    return BACKUP * is_used(v.backup) | G1 * is_used(v.g1) | FOLDED * is_used(v.folded) | STATE * is_used(v.state1) |
           MAXIMUM * is_used(v.state3);
  }
};

template <class S, int ALGORITHM, unsigned LISTS>
struct UpdateSpan {
  using C = Compute<S>;
  using Lists = UpdateLists;
  static constexpr bool IS_ADAM = ALGORITHM == Algorithm::ADAM;
  template <int COUNT>
  using P = Pack<S, COUNT>;
  template <unsigned LIST, class T = S>
  using Maybe = Part<T, (LISTS & LIST) != 0>;
  double& squares;  // sum of d^2
  Part<S> theta, last;
  Maybe<Lists::BACKUP> backup;
  Maybe<Lists::G1> g1;
  Maybe<Lists::FOLDED, C> folded;
  Maybe<Lists::STATE> state1;
  Part<S, IS_ADAM> state2;
  Part<S, IS_ADAM && (LISTS & Lists::MAXIMUM) != 0> state3;
  const Scalars<C, ALGORITHM>* h;

  template <int COUNT, int STEPS>
  __device__ __forceinline__ void tile(int element, int end, bool aligned) {
    P<COUNT> a[STEPS], b[STEPS], old[STEPS], state[STEPS][2];
    Pack<C, COUNT> c[STEPS];
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
      const int e = element + s * WARP * COUNT;
      load(a[s], g1, e, end, aligned);
      load(b[s], last, e, end, aligned);
      load(c[s], folded, e, end, aligned);
      load(old[s], backup, theta, e, end, aligned);
      load(state[s][0], state1, e, end, aligned);
      load(state[s][1], state2, e, end, aligned);
    }
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
      const int e = element + s * WARP * COUNT;
      C d[COUNT];
#pragma unroll
      for (int i = 0; i < COUNT; ++i) d[i] = direction(h->k, a[s].get(i), b[s].get(i), c[s].get(i));
      squares = add_products<S>(squares, d, d);
      if constexpr (IS_ADAM)
        adam_step(d, old[s], state[s][0], state[s][1], e, end, aligned);
      else
        sgd_step(d, old[s], state[s][0], e, end, aligned);
      store(old[s], theta, e, end, aligned);
    }
  }

  template <int COUNT>
  __device__ __forceinline__ void sgd_step(const C (&d)[COUNT], P<COUNT>& point, P<COUNT>& momentum_buffer, int e,
                                           int end, bool aligned) {
    const bool momentum = bool(state1);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const C old = point.get(i);
      C moved = momentum_buffer.get(i);
      point.set(i, momentum ? sgd_momentum(h->sgd, old, d[i], moved) : sgd(h->sgd, old, d[i]));
      momentum_buffer.set(i, moved);
    }
    if constexpr ((LISTS & Lists::STATE) != 0) {
      if (momentum) store(momentum_buffer, state1, e, end, aligned);
    }
  }

  template <int COUNT>
  __device__ __forceinline__ void adam_step(const C (&d)[COUNT], P<COUNT>& point, P<COUNT>& exp_avg,
                                            P<COUNT>& exp_avg_sq, int e, int end, bool aligned) {
    P<COUNT> maximum = {};
    if constexpr ((LISTS & Lists::MAXIMUM) != 0) {
      if (state3) {
        load(maximum, state3, e, end, aligned);
        adam_elements<true>(d, point, exp_avg, exp_avg_sq, maximum);
        store(maximum, state3, e, end, aligned);
      } else {
        adam_elements<false>(d, point, exp_avg, exp_avg_sq, maximum);
      }
    } else {
      adam_elements<false>(d, point, exp_avg, exp_avg_sq, maximum);
    }
    store(exp_avg, state1, e, end, aligned);
    store(exp_avg_sq, state2, e, end, aligned);
  }

  template <bool AMSGRAD, int COUNT>
  __device__ __forceinline__ void adam_elements(const C (&d)[COUNT], P<COUNT>& point, P<COUNT>& exp_avg,
                                                P<COUNT>& exp_avg_sq, P<COUNT>& maximum) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      C m = exp_avg.get(i), v = exp_avg_sq.get(i), w = AMSGRAD ? maximum.get(i) : C(0);
      point.set(i, adam<AMSGRAD>(h->adam, point.get(i), d[i], m, v, w));
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

template <class S, int ALGORITHM, unsigned LISTS>
__device__ __forceinline__ void combined_update(const CombinedUpdate& v, const int64_t* words) {
  using C = Compute<S>;
  using Body = UpdateSpan<S, ALGORITHM, LISTS>;
  using Lists = UpdateLists;
  // Adam keeps more of each element in registers than 16 bytes of the 16-bit types leave room for.
  constexpr int STEPS = 1, WIDTH = Body::IS_ADAM && sizeof(S) == 2 ? 4 : VECTOR<S>;
  __shared__ Slots<8> slots;
  __shared__ Scalars<C, ALGORITHM> scalars[1 + WARPS];  // of the chunk's first tensor; of another one, for each warp
  __shared__ DirectionScale scale;
  const Close close = close_step(v.partials, v.control, v.coefficients);
  const bool skip = close.skip;
  const Map map(v.layout, words);
  const int chunk = chunk_backwards();
  const int first_tensor = int(map.first_tensor(chunk));
  if (threadIdx.x == 0) scale = close.scale;
  if (threadIdx.x == 0 && first_tensor < v.layout.tensors) {
    const float* step = step_of(v, words, first_tensor);
    scalars[0].prepare(v.coefficients, int(map.group(first_tensor)), step ? *step + 1.0f : 0.0f, close.scale);
  }
  __syncthreads();
  const Scalars<C, ALGORITHM>* current = &scalars[0];
  double squares[1] = {};
  int turn = 0;
  for_each_span<S>(v.layout, map, chunk, [&](const Span& span) {
    if (skip || !is_updated(v, words, span.tensor)) {
      if (!address(v.backup, words, span.tensor)) return;
      Fetch fetch(slots, words, span);
      RestoreSpan<S> body{fetch.part<S>(v.theta), fetch.part<S>(v.backup)};
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
    Body body{squares[0]};
    body.theta = fetch.part<S>(v.theta);
    body.last = fetch.part<S>(v.last);
    body.backup = fetch.part<S, (LISTS & Lists::BACKUP) != 0>(v.backup);
    body.g1 = fetch.part<S, (LISTS & Lists::G1) != 0>(v.g1);
    body.folded = fetch.part<C, (LISTS & Lists::FOLDED) != 0>(v.folded);
    body.state1 = fetch.part<S, (LISTS & Lists::STATE) != 0>(v.state1);
    body.state2 = fetch.part<S, Body::IS_ADAM>(v.state2);
    body.state3 = fetch.part < S, Body::IS_ADAM && (LISTS & Lists::MAXIMUM) != 0 > (v.state3);
    body.h = current;
    for_each_element<WIDTH, STEPS>(span, turn, fetch.aligned(), body);
  });
  const bool is_last = finish_sums(v.direction, squares, chunk, v.layout);
  if (!is_last || skip) return;
  // Chunks of one tensor all read its step: the last block counts the steps.
  for (int i = threadIdx.x; i < v.layout.tensors; i += THREADS)
    if (is_updated(v, words, i)) *step_of(v, words, i) += 1.0f;
}

}  // namespace gam
