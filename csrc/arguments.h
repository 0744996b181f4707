// What the operators' arguments must be, checked once for every device: torch is known here, the math is not.
//
// A list comes as an int64 tensor of addresses; whether its tensors are what they shall be,
// gam_fused/backends/checks.py has looked at.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <string>
#include <vector>

#include "math/constants.h"
#include "operands.h"

namespace gam {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string describe(const Tensor& t) {
  std::string shape, strides;
  for (int64_t i = 0; i < t.dim(); ++i) {
    shape += (i ? ", " : "") + std::to_string(t.size(i));
    strides += (i ? ", " : "") + std::to_string(t.stride(i));
  }
  const std::string text = "shape [" + shape + "], dtype " + torch::headeronly::toString(t.scalar_type());
  return t.is_contiguous() ? text : text + ", strides [" + strides + "]";
}

inline std::string device_of(const Tensor& t) {
  const std::string index = t.get_device_index() < 0 ? "" : ":" + std::to_string(t.get_device_index());
  return (t.is_cpu() ? "cpu" : t.is_cuda() ? "cuda" : "another kind of device") + index;
}

// A list: an address per tensor, 0 where a tensor is missing. Host addresses, or a table that a GPU reads; neither
// where the list is not used.
struct Addresses {
  const int64_t* host = nullptr;
  const int64_t* device = nullptr;
};

// The layout table and the operands that go with it. `take_...` checks an operand of that kind (operands.h).
template <class Backend>
class Arguments {
 public:
  // `table`: int64 [3, T + 1] on the CPU: starts, groups, counted. `map`: the same for a GPU (`Layout.on`), or empty.
  // `workspace`: `Layout.workspace`.
  Arguments(const Tensor& table, const Tensor& map, const Tensor& workspace, int64_t chunk, int64_t dtype)
      : dtype_(dtype), chunk_(chunk) {
    STD_TORCH_CHECK(dtype >= DType::FLOAT32 && dtype <= DType::FLOAT16, "gam_fused: dtype code ", dtype,
                    " is not one of 0 (float32), 1, 2, 3; see gam_fused/backends/operators.py");
    STD_TORCH_CHECK(table.is_cpu() && table.scalar_type() == ScalarType::Long && table.dim() == 2 &&
                        table.size(0) == 3 && table.size(1) >= 1 && table.is_contiguous(),
                    "gam_fused: layout must be a contiguous int64 CPU tensor [3, T + 1], got ", describe(table));
    STD_TORCH_CHECK(chunk > 0 && chunk <= MAX_CHUNK, "gam_fused: chunk must be 1 to ", MAX_CHUNK, ", got ", chunk);
    tensors_ = table.size(1) - 1;
    spans_.reserve(8);
    STD_TORCH_CHECK(tensors_ <= MAX_TENSORS, "gam_fused: layout has ", tensors_, " tensors, more than ", MAX_TENSORS);
    starts_ = static_cast<const int64_t*>(table.const_data_ptr());
    check_table();
    workspace_ = float64("workspace", workspace, true);
    STD_TORCH_CHECK(workspace.is_contiguous() && workspace.numel() >= workspace_size(chunks()),
                    "gam_fused: workspace must be what Layout.workspace gives, ", workspace_size(chunks()),
                    " numbers, got ", describe(workspace));
    if (map.numel() == 0) return;
    STD_TORCH_CHECK(
        map.scalar_type() == ScalarType::Long && map.numel() == 3 * (tensors_ + 1) + chunks() && map.is_contiguous(),
        "gam_fused: map must be what Layout.on gives for the device of the lists, got ", describe(map));
    check_device("map", map);
    map_ = static_cast<const int64_t*>(map.const_data_ptr());
  }

  int64_t dtype() const { return dtype_; }
  int64_t tensors() const { return tensors_; }
  int64_t chunk() const { return chunk_; }
  int64_t chunks() const { return chunk_count(starts_[tensors_], chunk_); }
  const int64_t* starts() const { return starts_; }
  const int64_t* groups() const { return starts_ + tensors_ + 1; }
  const int64_t* counted() const { return groups() + tensors_ + 1; }
  const int64_t* map() const { return map_; }
  double* workspace() const { return workspace_; }
  int32_t device() const { return like_ ? like_->get_device_index() : -1; }
  const Tensor& like() const { return *like_; }  // a tensor of the device of the lists; there is one if there are any

  auto take_Gradients(const char* name, const Tensor& t) { return self().list(addresses(name, t)); }
  auto take_Directions(const char* name, const Tensor& t) { return take_Gradients(name, t); }
  auto take_Folded(const char* name, const Tensor& t) { return take_Gradients(name, t); }
  auto take_Folding(const char* name, const Tensor& t) { return take_Gradients(name, t); }
  auto take_State(const char* name, const Tensor& t) { return take_Gradients(name, t); }
  auto take_Counters(const char* name, const Tensor& t) { return take_Gradients(name, t); }
  auto take_Point(const char* name, const Tensor& t) { return self().list(complete(name, t)); }
  auto take_Backup(const char* name, const Tensor& t) { return take_Point(name, t); }
  auto take_Weights(const char* name, const Tensor& t) {
    const Addresses list = complete(name, t);
    STD_TORCH_CHECK(list.host || list.device || tensors_ == 0, "gam_fused: ", name, " must not be an empty list");
    return self().list(list);
  }
  auto take_Source(const char* name, const Tensor& t) { return take_Weights(name, t); }

  // The coefficient table, with a row for every param group of the layout.
  const double* take_Coefficients(const char* name, const Tensor& t) {
    const double* data = float64(name, t, false);
    STD_TORCH_CHECK(t.dim() == 2 && t.size(1) == COLUMNS && t.is_contiguous(), "gam_fused: ", name,
                    " must be [groups, ", COLUMNS, "], contiguous, got ", describe(t));
    int64_t last = 0;
    for (int64_t i = 0; i < tensors_; ++i) last = std::max(last, groups()[i]);
    STD_TORCH_CHECK(last < t.size(0), "gam_fused: ", name, " have ", t.size(0), " rows, the layout names group ", last);
    return data;
  }

  double* take_Control(const char* name, const Tensor& t) {
    double* data = float64(name, t, true);
    STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == CONTROLS && t.is_contiguous(), "gam_fused: ", name, " must be [",
                    CONTROLS, "], contiguous, got ", describe(t));
    return data;
  }

  Matrix take_Norm(const char* name, const Tensor& t) { return column(name, t, {2}); }
  Matrix take_Products(const char* name, const Tensor& t) { return column(name, t, {2, 6}); }
  Matrix take_Squares(const char* name, const Tensor& t) { return column(name, t, {1}); }
  Matrix take_NormTotals(const char* name, const Tensor& t) { return sums(name, t, {2}, false); }
  Matrix take_ProductTotals(const char* name, const Tensor& t) { return sums(name, t, {2, 6}, false); }

  int take_Ascent(const char* name, int64_t value) {
    STD_TORCH_CHECK(value >= 0 && value <= 2, "gam_fused: ", name, " must be 0, 1 or 2, got ", value);
    return static_cast<int>(value);
  }
  int take_BaseOptimizer(const char* name, int64_t value) {
    STD_TORCH_CHECK(value >= 0 && value < Algorithm::COUNT, "gam_fused: unknown ", name, " ", value);
    return static_cast<int>(value);
  }
  bool take_Switch(const char*, bool value) { return value; }

  void require(const char* name, const int64_t* addresses, int64_t i) const {
    STD_TORCH_CHECK((addresses && addresses[i]) || starts_[i + 1] == starts_[i], "gam_fused: ", name, "[", i,
                    "] is missing, the layout gives it ", starts_[i + 1] - starts_[i], " elements");
  }

  // All operands but the layout's table lie on one device.
  void check_device(const std::string& name, const Tensor& t) {
    STD_TORCH_CHECK(t.is_cpu() == Backend::ON_CPU, "gam_fused: ", name, " is on ", device_of(t), ", expected ",
                    Backend::ON_CPU ? "cpu" : "cuda", "; move it to the device of the other operands");
    if (!like_) like_ = &t;
    STD_TORCH_CHECK(t.get_device_index() == like_->get_device_index(), "gam_fused: ", name, " is on ", device_of(t),
                    ", operands before it on ", device_of(*like_), "; move it there");
  }

 private:
  // Kernels count elements of a chunk, chunks, tensors and groups in 32 bits, and bytes of the flat vector in 64.
  static constexpr int64_t MAX_CHUNK = int64_t(1) << 30, MAX_TENSORS = int64_t(1) << 26, MAX_GROUP = 0x7FFFFFFF;
  static constexpr int64_t MAX_ELEMENTS = int64_t(1) << 59;

  struct Span {
    const char* name;
    const double *begin, *end;
    bool written;
  };

  // Kernels follow its numbers without looking.
  void check_table() const {
    STD_TORCH_CHECK(starts_[0] == 0, "gam_fused: layout must begin at element 0, got ", starts_[0]);
    for (int64_t i = 0; i < tensors_; ++i) {
      STD_TORCH_CHECK(starts_[i] <= starts_[i + 1], "gam_fused: layout has tensor ", i, " end at ", starts_[i + 1],
                      ", before its begin ", starts_[i]);
      STD_TORCH_CHECK(groups()[i] >= 0 && groups()[i] <= MAX_GROUP, "gam_fused: layout names group ", groups()[i],
                      " for tensor ", i, ", expected 0 to ", MAX_GROUP);
    }
    STD_TORCH_CHECK(starts_[tensors_] <= MAX_ELEMENTS, "gam_fused: layout has ", starts_[tensors_],
                    " elements, more than memory can hold");
    STD_TORCH_CHECK(chunks() <= MAX_CHUNK, "gam_fused: a chunk of ", chunk_, " elements makes ", chunks(), " chunks");
  }

  Backend& self() { return static_cast<Backend&>(*this); }

  Addresses addresses(const char* name, const Tensor& t) {
    const int64_t count = t.numel();
    if (count == 0) return {};
    STD_TORCH_CHECK(count == tensors_ && t.scalar_type() == ScalarType::Long && t.is_contiguous(), "gam_fused: ", name,
                    " must be ", tensors_, " int64 addresses, contiguous, on the CPU (or, for a GPU, there), got ",
                    describe(t));
    const int64_t* data = static_cast<const int64_t*>(t.const_data_ptr());
    if (t.is_cpu()) return {data, nullptr};
    check_device(name, t);
    return {nullptr, data};
  }

  // A list of which no tensor may be missing, though the whole list may be.
  Addresses complete(const char* name, const Tensor& t) {
    const Addresses list = addresses(name, t);
    for (int64_t i = 0; list.host && i < tensors_; ++i) require(name, list.host, i);
    return list;
  }

  // An operand in float64. None lies in the memory of another, unless both are only read.
  double* float64(const char* name, const Tensor& t, bool written) {
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Double, "gam_fused: ", name, " must be float64, got ", describe(t));
    check_device(name, t);
    double* data = static_cast<double*>(t.mutable_data_ptr());
    if (t.numel() == 0) return data;
    const Span span{name, data, data + extent(t), written};
    for (const Span& other : spans_) {
      const bool apart = span.end <= other.begin || other.end <= span.begin;
      STD_TORCH_CHECK(apart || !(written || other.written), "gam_fused: ", name, " lies in the memory of ", other.name,
                      "; kernels write there meanwhile");
    }
    spans_.push_back(span);
    return data;
  }

  // Elements from the first to the last, gaps between them included.
  static int64_t extent(const Tensor& t) {
    int64_t last = 0;
    for (int64_t i = 0; i < t.dim(); ++i) last += (t.size(i) - 1) * t.stride(i);
    return last + 1;
  }

  // A single column of sums, to be written.
  Matrix column(const char* name, const Tensor& t, std::initializer_list<int64_t> rows) {
    const Matrix matrix = sums(name, t, rows, true);
    STD_TORCH_CHECK(matrix.columns == 1, "gam_fused: ", name, " must have one column, got ", describe(t));
    return matrix;
  }

  // float64 sums: [rows, columns], or [columns], with unit stride.
  Matrix sums(const char* name, const Tensor& t, std::initializer_list<int64_t> rows, bool written) {
    double* data = float64(name, t, written);
    const int64_t last = t.dim() - 1;
    STD_TORCH_CHECK((last == 0 || last == 1) && t.size(last) >= 1 && (t.size(last) == 1 || t.stride(last) == 1),
                    "gam_fused: ", name, " must have columns of unit stride, got ", describe(t));
    const int64_t count = last ? t.size(0) : 1;
    STD_TORCH_CHECK(std::find(rows.begin(), rows.end(), count) != rows.end(), "gam_fused: ", name, " must have ",
                    *rows.begin(), " rows", rows.size() > 1 ? " (or 6)" : "", ", got ", describe(t));
    STD_TORCH_CHECK(count == 1 || t.stride(0) >= t.size(last), "gam_fused: ", name,
                    " must have rows that do not overlap in memory, got ", describe(t));
    return {data, count, t.size(last), last ? t.stride(0) : 0};
  }

  int64_t dtype_, chunk_, tensors_ = 0;
  const int64_t *starts_ = nullptr, *map_ = nullptr;
  double* workspace_ = nullptr;
  const Tensor* like_ = nullptr;
  std::vector<Span> spans_;
};

}  // namespace gam
