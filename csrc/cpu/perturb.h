// Kernel `perturb_`: theta <- base + radius * (x - y) / (norm + eps), with the backup and the fold of folded on the
// way.
#pragma once

#include "../math/ascent.h"
#include "../math/rounding.h"
#include "../math/skip.h"
#include "sums.h"

namespace gam {
namespace {

// Low-precision weights are rounded stochastically, or a perturbation below their spacing would be lost.
template <class S>
void round_tile(S* theta, Compute<S>* moved, const Span& tile, uint32_t key) {
  if constexpr (!Tiles<S>::direct) {
    const uint32_t stream = noise_stream(key, tile.position), low = uint32_t(tile.position);
    for (uint32_t i = 0; i < uint32_t(tile.count); ++i) moved[i] = neighbour(moved[i], noise(stream, low + i), S{});
    narrow_all(moved, tile.count, theta);
    widen_all(theta, tile.count, moved);
  }
}

// theta <- base + scale * (x - y). Returns the sum of (theta - base)^2 as stored.
template <class S, bool ADAPTIVE>
double ascend_tile(const Perturb& v, const Span& tile, Compute<S> scale, uint32_t key) {
  using C = Compute<S>;
  alignas(64) C buffers[5][TILE];
  S* theta = at<S>(v.theta, tile);
  const C* base = Tiles<S>::read(v.base ? v.base : v.theta, tile, buffers[0]);
  const C* x = Tiles<S>::read(v.x, tile, buffers[1]);
  const C* y = Tiles<S>::read(v.y, tile, buffers[2]);
  const bool stream = v.base && streams<S>(v.layout);
  C *moved = Tiles<S>::target(theta, buffers[3], stream), *change = buffers[4];
  GAM_INDEPENDENT
  for (int64_t i = 0; i < tile.count; ++i) {
    const C origin = base[i];
    const C value = ADAPTIVE ? ascend_adaptive(origin, scale, x[i], y[i]) : ascend(origin, scale, x[i], y[i]);
    change[i] = change_of(value, origin);
    moved[i] = value;
  }
  if constexpr (!Tiles<S>::direct) {
    round_tile<S>(theta, moved, tile, key);
    for (int64_t i = 0; i < tile.count; ++i) change[i] = change_of(moved[i], base[i]);
  } else {
    Tiles<S>::write(theta, moved, tile.count, stream);
  }
  return sum_of_squares(change, tile.count);
}

template <class S>
void fold_tile(const Perturb& v, const Span& tile, const double* row) {
  using C = Compute<S>;
  alignas(64) C buffer[TILE];
  const C c0 = C(row[Column::FOLD_0]), c2 = C(row[Column::FOLD_2]);
  C* folded = at<C>(v.folded, tile);
  const C* x = Tiles<S>::read(v.x, tile, buffer);
  GAM_INDEPENDENT
  for (int64_t i = 0; i < tile.count; ++i) folded[i] = fold(c0, folded[i], c2, x[i]);
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
  clear_unused(v.realised, v.layout);
  for_each_chunk(v.layout, parallel_for, [&](int64_t chunk) {
    double realised = 0.0;
    for_each_span(v.layout, chunk, [&](const Span& span) {
      double radius = v.coefficients[v.layout.groups[span.tensor] * COLUMNS + Column::RADIUS_0 + v.ascent];
      double scale = stay ? 0.0 : ascent_scale(radius, total[0], loss_scale, eps);
      for_each_tile(span, [&](const Span& tile) { realised += perturb_tile<S>(v, tile, scale, key); });
    });
    put(v.realised, 0, chunk, realised);
  });
}

}  // namespace
}  // namespace gam
