// Kernel `perturb_`: theta <- base + radius * (x - y) / (norm + eps), with the backup and the fold of folded on the
// way.
#pragma once

#include "../math/ascent.h"
#include "../math/rounding.h"
#include "../math/skip.h"
#include "packs.cuh"
#include "sums.cuh"

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

// Which of the operands are there that not every ascent has.
struct PerturbLists {
  enum : unsigned { BASE = 1, Y = 2, FOLDED = 4, BACKUP = 8, ADAPTIVE = 16, ALL = 31 };
  static unsigned of(const Perturb& v) {
    return BASE * is_used(v.base) | Y * is_used(v.y) | FOLDED * is_used(v.folded) | BACKUP * is_used(v.backup) |
           ADAPTIVE * v.adaptive;
  }
};

template <class S, unsigned LISTS>
struct PerturbSpan {
  using C = Compute<S>;
  using Lists = PerturbLists;
  template <unsigned LIST, class T = S>
  using Maybe = Part<T, (LISTS & LIST) != 0>;
  Part<S> theta, x;
  Maybe<Lists::BASE> base;
  Maybe<Lists::Y> y;
  Maybe<Lists::BACKUP> backup;
  Maybe<Lists::FOLDED, C> folded;
  int64_t position;  // of the span's origin in the flat vector
  C scale, fold_0, fold_2;
  uint32_t key;
  bool moves, adaptive;
  double realised;

  template <int COUNT, int STEPS>
  __device__ __forceinline__ void tile(int element, int end, bool aligned) {
    Pack<S, COUNT> origin[STEPS], a[STEPS], b[STEPS];
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
      const int e = element + s * WARP * COUNT;
      load(origin[s], base, theta, e, end, aligned);
      load(a[s], x, e, end, aligned);
      load(b[s], y, e, end, aligned);
    }
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
      const int e = element + s * WARP * COUNT;
      back_up(origin[s], e, end, aligned);
      fold_step(a[s], e, end, aligned);
      if (moves) ascend_step(origin[s], a[s], b[s], e);
      store(origin[s], theta, e, end, aligned);
    }
  }

  // Past the caches: it is read again only after a pass.
  template <int COUNT>
  __device__ __forceinline__ void back_up(const Pack<S, COUNT>& origin, int e, int end, bool aligned) {
    if constexpr ((LISTS & Lists::BACKUP) != 0) {
      if (!backup) return;
      Pack<S, COUNT> present = origin;
      if (base) load(present, theta, e, end, aligned);
      store<false>(present, backup, e, end, aligned);
    }
  }

  template <int COUNT>
  __device__ __forceinline__ void fold_step(const Pack<S, COUNT>& a, int e, int end, bool aligned) {
    if constexpr ((LISTS & Lists::FOLDED) != 0) {
      if (!folded) return;
      Pack<C, COUNT> value;
      load(value, folded, e, end, aligned);
#pragma unroll
      for (int i = 0; i < COUNT; ++i) value.set(i, fold(fold_0, value.get(i), fold_2, a.get(i)));
      store(value, folded, e, end, aligned);
    }
  }

  template <int COUNT>
  __device__ __forceinline__ void ascend_step(Pack<S, COUNT>& point, const Pack<S, COUNT>& a, const Pack<S, COUNT>& b,
                                              int e) {
    const Noise noise(key, position + e);
    C changes[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const C from = point.get(i), p = a.get(i), q = b.get(i);
      const bool by_weights = (LISTS & Lists::ADAPTIVE) != 0 && adaptive;
      const C to = by_weights ? ascend_adaptive(from, scale, p, q) : ascend(from, scale, p, q);
      S stored;
      round_perturbed(noise, i, to, stored);
      point.set_raw(i, stored);
      changes[i] = change_of(point.get(i), from);
    }
    realised = add_products<S>(realised, changes, changes);
  }
};

template <class S, unsigned LISTS>
__device__ __forceinline__ void perturb(const Perturb& v, const int64_t* words) {
  using C = Compute<S>;
  using Body = PerturbSpan<S, LISTS>;
  using Lists = PerturbLists;
  constexpr int STEPS = 1;
  __shared__ Slots<6> slots;
  double total[2];
  row_totals(v.partials, total);
  // Every block decides alike: block 0 writes FOUND_INF only where others do not read it or would read the same.
  const bool bad = !all_finite(total);
  double* control = v.control;
  const bool stay = stays(bad, v.ascent, control);
  if (blockIdx.x == 0 && threadIdx.x == 0) note_found_inf(bad, v.ascent, control);
  const double unit = ascent_scale(1.0, total[0], control[Control::LOSS_SCALE], control[Control::EPS]);
  const uint32_t key = noise_key(control[Control::NOISE_SEED], control[Control::NOISE_STEP], v.ascent);
  const Map map(v.layout, words);
  const int chunk = chunk_backwards();
  double realised[1] = {};
  int turn = 0;
  for_each_span<S>(v.layout, map, chunk, [&](const Span& span) {
    const double* row = v.coefficients + map.group(span.tensor) * COLUMNS;
    Body body;
    body.position = map.start(span.tensor) + span.origin;
    Fetch fetch(slots, words, span);
    body.theta = fetch.part<S>(v.theta);
    body.x = fetch.part<S>(v.x);
    body.base = fetch.part<S, (LISTS & Lists::BASE) != 0>(v.base);
    body.y = fetch.part<S, (LISTS & Lists::Y) != 0>(v.y);
    body.backup = fetch.part<S, (LISTS & Lists::BACKUP) != 0>(v.backup);
    body.folded = fetch.part<C, (LISTS & Lists::FOLDED) != 0>(v.folded);
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
  finish_sums(v.realised, realised, chunk, v.layout);
}

}  // namespace gam
