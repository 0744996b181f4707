// Kernel `perturb_`: theta <- base + radius * (x - y) / (norm + eps), with the backup and the fold of folded on the
// way.
#pragma once

#include "../math/ascent.h"
#include "../math/rounding.h"
#include "../math/skip.h"
#include "multi_tensor.cuh"

namespace gam {

// The noise of neighbouring elements from `position` on; their stream changes where positions cross a multiple of 2^32.
struct Noise {
  uint32_t low, stream, next;

  __device__ Noise(uint32_t key, int64_t position)
      : low(uint32_t(position)), stream(noise_stream(key, position)), next(stream) {
    if (low + 16u < low) next = noise_stream(key, position + 16);
  }
  __device__ uint32_t operator()(int i) const {
    return noise(low + uint32_t(i) < low ? next : stream, low + uint32_t(i));
  }
};

// Low-precision weights are rounded stochastically, or a perturbation below their spacing would be lost.
template <class S>
__device__ __forceinline__ void round_perturbed(const Noise& noise, int i, Compute<S> value, S& out) {
  stochastic_round(value, noise(i), out);
}
__device__ __forceinline__ void round_perturbed(const Noise&, int, float value, float& out) { out = value; }
__device__ __forceinline__ void round_perturbed(const Noise&, int, double value, double& out) { out = value; }

template <class S>
struct PerturbSpan {
  using C = Compute<S>;
  Span span;
  Part<S> theta, base, x, y, backup;  // base: theta itself where there is none
  Part<C> folded;
  int64_t position;  // of the span's origin in the flat vector
  C scale, fold_0, fold_2;
  uint32_t key;
  bool moves, adaptive;
  double realised;

  template <int COUNT, int STEPS>
  __device__ __forceinline__ void tile(int element) {
    Pack<S, COUNT> origin[STEPS], a[STEPS], b[STEPS];
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
      const int e = element + s * WARP * COUNT;
      load(origin[s], base, e);
      load(a[s], x, e);
      load(b[s], y, e);
    }
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
      const int e = element + s * WARP * COUNT;
      if (backup) back_up(origin[s], e);
      if (folded) fold_step(a[s], e);
      if (moves) ascend_step(origin[s], a[s], b[s], e);
      store(origin[s], theta, e);
    }
  }

  template <int COUNT>
  __device__ __forceinline__ void back_up(const Pack<S, COUNT>& origin, int e) {
    Pack<S, COUNT> present = origin;
    if (base.data() != theta.data()) load(present, theta, e);
    store(present, backup, e);
  }

  template <int COUNT>
  __device__ __forceinline__ void fold_step(const Pack<S, COUNT>& a, int e) {
    Pack<C, COUNT> value;
    load(value, folded, e);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) value.set(i, fold(fold_0, value.get(i), fold_2, a.get(i)));
    store(value, folded, e);
  }

  template <int COUNT>
  __device__ __forceinline__ void ascend_step(Pack<S, COUNT>& point, const Pack<S, COUNT>& a, const Pack<S, COUNT>& b,
                                              int e) {
    const Noise noise(key, position + e);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const C from = point.get(i), p = a.get(i), q = b.get(i);
      const C to = adaptive ? ascend_adaptive(from, scale, p, q) : ascend(from, scale, p, q);
      S stored;
      round_perturbed(noise, i, to, stored);
      point.set_raw(i, stored);
      const C change = change_of(point.get(i), from);
      realised = add_product(realised, change, change);
    }
  }
};

template <class S>
__device__ __forceinline__ void perturb(const Perturb& v, const int64_t* words) {
  using C = Compute<S>;
  constexpr int STEPS = 1;
  __shared__ WarpSums<2> shared;
  __shared__ WarpSums<1> shared_realised;
  __shared__ Slots<6> slots;
  double total[2];
  row_totals(v.partials, total, shared);
  // Every block decides alike: block 0 writes FOUND_INF only where others do not read it or would read the same.
  const bool bad = !all_finite(total);
  double* control = v.control;
  const bool stay = stays(bad, v.ascent, control);
  if (blockIdx.x == 0 && threadIdx.x == 0) note_found_inf(bad, v.ascent, control);
  const double unit = ascent_scale(1.0, total[0], control[Control::LOSS_SCALE], control[Control::EPS]);
  const uint32_t key = noise_key(control[Control::NOISE_SEED], control[Control::NOISE_STEP], v.ascent);
  const Map map(v.layout, words);
  double realised[1] = {};
  int turn = 0;
  for_each_span<S>(v.layout, map, [&](const Span& span) {
    const double* row = v.coefficients + map.group(span.tensor) * COLUMNS;
    PerturbSpan<S> body;
    body.span = span;
    body.position = map.start(span.tensor) + span.origin;
    Fetch fetch(slots, words, span);
    body.theta = fetch.part<S>(v.theta);
    body.base = fetch.part<S>(v.base, v.theta);
    body.x = fetch.part<S>(v.x);
    body.y = fetch.part<S>(v.y);
    body.folded = fetch.part<C>(v.folded);
    body.backup = fetch.part<S>(v.backup);
    const bool is_aligned = fetch.aligned();
    const double scale = stay ? 0.0 : row[Column::RADIUS_0 + v.ascent] * unit;
    body.scale = C(scale);
    body.fold_0 = C(row[Column::FOLD_0]);
    body.fold_2 = C(row[Column::FOLD_2]);
    body.key = key;
    body.moves = scale != 0.0 && (body.x || body.y);
    body.adaptive = v.adaptive;
    body.realised = 0.0;
    for_each_element<VECTOR<S>, STEPS>(span, turn, is_aligned, body);
    realised[0] += body.realised;
  });
  put_sums(v.realised, realised, shared_realised);
}

}  // namespace gam
