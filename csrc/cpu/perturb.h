// Kernel `perturb_`: theta <- base + radius * (x - y) / (norm + eps), with the backup and the fold of folded on the
// way.
#pragma once

#include "../math/ascent.h"
#include "../math/rounding.h"
#include "../math/skip.h"
#include "sums.h"

namespace gam {
namespace {

// The value that theta will hold for `value`. Low-precision weights are rounded stochastically, or a perturbation below
// their spacing would be lost.
template <class S>
inline __attribute__((always_inline)) Compute<S> rounded(Compute<S> value, uint32_t noise) {
  if constexpr (sizeof(S) == sizeof(value)) {
    return value;
  } else {
    return stochastic(value, noise, S{});
  }
}

// theta <- base + scale * (x - y). Returns the sum of (theta - base)^2 as stored.
template <class S, bool ADAPTIVE>
double ascend_tile(const Perturb& v, const Span& tile, Compute<S> scale, uint32_t key) {
  using C = Compute<S>;
  using L = InLoops<S>;
  alignas(64) L buffers[4][TILE];
  alignas(64) C change[TILE];
  S* theta = at<S>(v.theta, tile);
  const L* base = Tiles<S>::read(v.base ? v.base : v.theta, tile, buffers[0]);
  const L* x = Tiles<S>::read(v.x, tile, buffers[1]);
  const L* y = Tiles<S>::read(v.y, tile, buffers[2]);
  const bool stream = v.base && streams<S>(v.layout);
  L* moved = Tiles<S>::target(theta, buffers[3], stream);
  const uint32_t stream_of_noise = noise_stream(key, tile.position), low = uint32_t(tile.position);
  const int count = int(tile.count);
  GAM_INDEPENDENT
  for (int i = 0; i < count; ++i) {
    const C origin = widen(base[i]), dx = widen(x[i]), dy = widen(y[i]);
    const C value = ADAPTIVE ? ascend_adaptive(origin, scale, dx, dy) : ascend(origin, scale, dx, dy);
    const C stored = rounded<S>(value, noise(stream_of_noise, low + uint32_t(i)));
    narrow_exact(stored, moved[i]);
    change[i] = change_of(stored, origin);
  }
  Tiles<S>::write(theta, moved, tile.count, stream);
  return sum_of_squares(change, tile.count);
}

template <class S>
void fold_tile(const Perturb& v, const Span& tile, const double* row) {
  using C = Compute<S>;
  alignas(64) InLoops<S> buffer[TILE];
  const C c0 = C(row[Column::FOLD_0]), c2 = C(row[Column::FOLD_2]);
  C* folded = at<C>(v.folded, tile);
  const InLoops<S>* x = Tiles<S>::read(v.x, tile, buffer);
  GAM_INDEPENDENT
  for (int64_t i = 0; i < tile.count; ++i) folded[i] = fold(c0, folded[i], c2, widen(x[i]));
}

template <class S>
double perturb_tile(const Perturb& v, const Span& tile, double scale, uint32_t key) {
  S* theta = at<S>(v.theta, tile);
  if (v.backup) copy_tile(at<S>(v.backup, tile), theta, tile.count * sizeof(S), streams<S>(v.layout));
  double realised = 0.0;
  if (scale != 0.0 && (has(v.x, tile.tensor) || has(v.y, tile.tensor)))
    realised = v.adaptive ? ascend_tile<S, true>(v, tile, Compute<S>(scale), key)
                          : ascend_tile<S, false>(v, tile, Compute<S>(scale), key);
  else if (v.base)
    memcpy(theta, at<S>(v.base, tile), tile.count * sizeof(S));
  if (has(v.folded, tile.tensor)) fold_tile<S>(v, tile, v.coefficients + v.layout.groups[tile.tensor] * COLUMNS);
  return realised;
}

template <class S>
void perturb(const Perturb& v, ParallelFor parallel_for) {
  double total[2];
  row_sums(v.partials, total);
  const bool bad = !all_finite(total), stay = stays(bad, v.ascent, v.control);
  double* control = v.control;
  note_found_inf(bad, v.ascent, control);
  const uint32_t key = noise_key(control[Control::NOISE_SEED], control[Control::NOISE_STEP], v.ascent);
  const double loss_scale = control[Control::LOSS_SCALE], eps = control[Control::EPS];
  sum_over_chunks<1>(v.layout, parallel_for, v.realised, [&](int64_t chunk, double* realised) {
    for_each_span(v.layout, chunk, [&](const Span& span) {
      double radius = v.coefficients[v.layout.groups[span.tensor] * COLUMNS + Column::RADIUS_0 + v.ascent];
      double scale = stay ? 0.0 : ascent_scale(radius, total[0], loss_scale, eps);
      for_each_tile(span, [&](const Span& tile) { *realised += perturb_tile<S>(v, tile, scale, key); });
    });
  });
}

}  // namespace
}  // namespace gam
