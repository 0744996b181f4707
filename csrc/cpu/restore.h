// Kernel `restore_`: theta <- backup, bit for bit.
#pragma once

#include "walk.h"

namespace gam {
namespace {

template <class S>
void restore_span(AddressRow theta, AddressRow backup, const Span& span, bool stream) {
  copy_tile(at<S>(theta, span), at<S>(backup, span), span.count * sizeof(S), stream);
}

template <class S>
void restore(const Restore& v, ParallelFor parallel_for) {
  for_each_chunk(v.layout, parallel_for, [&](int64_t chunk) {
    for_each_span(v.layout, chunk,
                  [&](const Span& span) { restore_span<S>(v.theta, v.backup, span, streams<S>(v.layout)); });
  });
}

}  // namespace
}  // namespace gam
