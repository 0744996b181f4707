// What the operators' arguments must be, checked once for every device: torch is known here, the math is not.
//
// A list operand comes as `Tensor[]`, or, on the hot path, as an int64 CPU tensor of addresses that the caller vouches
// for; the same operator template takes both.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <deque>
#include <initializer_list>
#include <string>
#include <vector>

#include "gam_math.h"
#include "verbs.h"

namespace gam {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

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

inline bool equal_strides(const Tensor& a, const Tensor& b) {
  if (a.is_contiguous() && b.is_contiguous()) return true;
  if (a.dim() != b.dim()) return false;
  for (int64_t i = 0; i < a.dim(); ++i)
    if (a.size(i) != b.size(i) || (a.size(i) != 1 && a.stride(i) != b.stride(i))) return false;
  return true;
}

// Whether the elements fill one gapless stretch of memory, in whatever order of dimensions.
inline bool is_dense(const Tensor& t) {
  if (t.is_contiguous()) return true;
  std::vector<std::pair<int64_t, int64_t>> dimensions;  // stride, size
  for (int64_t i = 0; i < t.dim(); ++i)
    if (t.size(i) != 1) dimensions.emplace_back(t.stride(i), t.size(i));
  std::sort(dimensions.begin(), dimensions.end());
  int64_t expected = 1;
  for (auto [stride, size] : dimensions) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

inline ScalarType storage_dtype(int64_t dtype) {
  switch (dtype) {
    case DType::FLOAT32:
      return ScalarType::Float;
    case DType::FLOAT64:
      return ScalarType::Double;
    case DType::BFLOAT16:
      return ScalarType::BFloat16;
    case DType::FLOAT16:
      return ScalarType::Half;
  }
  STD_TORCH_CHECK(false, "gam_fused: dtype code ", dtype, " is not one of 0 (float32), 1, 2, 3; see gam_fused/backends/operators.py");
}

// One operand: an address per tensor, 0 where a tensor is missing. Host addresses, or a table that a GPU reads; neither
// where the list is not used.
struct Operand {
  const int64_t* host = nullptr;
  const int64_t* device = nullptr;
};

// The layout table and the lists that go with it.
class Lists {
 public:
  // `table`: int64 [3, T + 1] on the CPU: starts, groups, counted. `map`: the same for a GPU (`Layout.on`), or empty.
  Lists(const Tensor& table, const Tensor& map, int64_t chunk, int64_t dtype, bool on_cpu)
      : dtype_(dtype),
        storage_(storage_dtype(dtype)),
        compute_(dtype == DType::FLOAT64 ? ScalarType::Double : ScalarType::Float),
        on_cpu_(on_cpu),
        chunk_(chunk) {
    STD_TORCH_CHECK(table.is_cpu() && table.scalar_type() == ScalarType::Long && table.dim() == 2 &&
                        table.size(0) == 3 && table.size(1) >= 1 && table.is_contiguous(),
                    "gam_fused: layout must be a contiguous int64 CPU tensor [3, T + 1], got ", describe(table));
    STD_TORCH_CHECK(chunk > 0 && chunk <= MAX_CHUNK, "gam_fused: chunk must be 1 to ", MAX_CHUNK, ", got ", chunk);
    tensors_ = table.size(1) - 1;
    STD_TORCH_CHECK(tensors_ <= MAX_TENSORS, "gam_fused: layout has ", tensors_, " tensors, more than ", MAX_TENSORS);
    starts_ = static_cast<const int64_t*>(table.const_data_ptr());
    check_table();
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
  int32_t device() const { return like_ ? like_->get_device_index() : -1; }
  const Tensor& like() const { return *like_; }  // a tensor of the device of the lists; there is one if there are any

  // A list in the dtype of storage, of compute (acc), or of step counters; tensors may be missing.
  template <class List>
  Operand storage(const char* name, const List& list) {
    return take(name, list, storage_);
  }
  // The same, complete: no tensor may be missing, though the whole list may be.
  template <class List>
  Operand complete(const char* name, const List& list) {
    const Operand operand = take(name, list, storage_);
    for (int64_t i = 0; operand.host && i < tensors_; ++i) require(name, operand.host, i);
    return operand;
  }
  // The same, which must be there.
  template <class List>
  Operand required(const char* name, const List& list) {
    const Operand operand = complete(name, list);
    STD_TORCH_CHECK(operand.host || operand.device || tensors_ == 0, "gam_fused: ", name, " must not be an empty list");
    return operand;
  }
  template <class List>
  Operand compute(const char* name, const List& list) {
    return take(name, list, compute_);
  }
  template <class List>
  Operand counters(const char* name, const List& list) {
    return take(name, list, ScalarType::Float, true);
  }

  void require(const char* name, const int64_t* addresses, int64_t i) const {
    STD_TORCH_CHECK((addresses && addresses[i]) || starts_[i + 1] == starts_[i], "gam_fused: ", name, "[", i,
                    "] is missing, the layout gives it ", starts_[i + 1] - starts_[i], " elements");
  }

  // All operands but the layout's table lie on one device.
  void check_device(const std::string& name, const Tensor& t) {
    STD_TORCH_CHECK(t.is_cpu() == on_cpu_, "gam_fused: ", name, " is on ", device_of(t), ", expected ",
                    on_cpu_ ? "cpu" : "cuda", "; move it to the device of the other operands");
    if (!like_) like_ = &t;
    STD_TORCH_CHECK(t.get_device_index() == like_->get_device_index(), "gam_fused: ", name, " is on ", device_of(t),
                    ", operands before it on ", device_of(*like_), "; move it there");
  }

 private:
  // Kernels count elements of a chunk, chunks, tensors and groups in 32 bits, and bytes of the flat vector in 64.
  static constexpr int64_t MAX_CHUNK = int64_t(1) << 30, MAX_TENSORS = int64_t(1) << 26, MAX_GROUP = 0x7FFFFFFF;
  static constexpr int64_t MAX_ELEMENTS = int64_t(1) << 59;

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

  Operand take(const char* name, const Tensor& addresses, ScalarType, bool = false) {
    const int64_t count = addresses.numel();
    if (count == 0) return {};
    STD_TORCH_CHECK(count == tensors_ && addresses.scalar_type() == ScalarType::Long && addresses.is_contiguous(),
                    "gam_fused: ", name, " must be ", tensors_,
                    " int64 addresses, contiguous, on the CPU (or, for a GPU, there), got ", describe(addresses));
    const int64_t* data = static_cast<const int64_t*>(addresses.const_data_ptr());
    if (addresses.is_cpu()) return {data, nullptr};
    check_device(name, addresses);
    return {nullptr, data};
  }

  Operand take(const char* name, const Tensors& list, ScalarType dtype, bool scalars = false) {
    if (list.empty()) return {};
    const int64_t count = static_cast<int64_t>(list.size());
    STD_TORCH_CHECK(count == tensors_, "gam_fused: ", name, " has ", count, " tensors, the layout ", tensors_);
    owned_.emplace_back(count);
    if (!scalars) strides_.resize(count, nullptr);
    for (int64_t i = 0; i < count; ++i) {
      const Tensor& t = list[i];
      const int64_t numel = t.numel();
      if (numel == 0) continue;  // stands for a missing tensor: address 0
      check(name, i, t, numel, dtype, scalars ? 1 : starts_[i + 1] - starts_[i]);
      if (!scalars) check_strides(name, i, t);
      owned_.back()[i] = reinterpret_cast<int64_t>(t.mutable_data_ptr());
    }
    return {owned_.back().data(), nullptr};
  }

  void check(const char* name, int64_t i, const Tensor& t, int64_t numel, ScalarType dtype, int64_t expected) {
    check_device(std::string(name) + "[" + std::to_string(i) + "]", t);
    STD_TORCH_CHECK(t.scalar_type() == dtype, "gam_fused: ", name, "[", i, "] has ", describe(t), ", expected dtype ",
                    torch::headeronly::toString(dtype));
    STD_TORCH_CHECK(numel == expected, "gam_fused: ", name, "[", i, "] has ", describe(t), ": ", numel,
                    " elements, the layout says ", expected);
  }

  void check_strides(const char* name, int64_t i, const Tensor& t) {
    STD_TORCH_CHECK(is_dense(t), "gam_fused: ", name, "[", i, "] (", describe(t), ") has gaps or overlaps in memory");
    if (strides_[i] == nullptr) strides_[i] = &t;
    STD_TORCH_CHECK(equal_strides(*strides_[i], t), "gam_fused: ", name, "[", i, "] (", describe(t),
                    ") lies in memory in another order than the same tensor of the lists before it");
  }

  int64_t dtype_;
  ScalarType storage_, compute_;
  bool on_cpu_;
  int64_t chunk_, tensors_ = 0;
  const int64_t *starts_ = nullptr, *map_ = nullptr;
  const Tensor* like_ = nullptr;
  std::deque<std::vector<int64_t>> owned_;  // addresses of `Tensor[]` operands
  std::vector<const Tensor*> strides_;      // the first tensor seen at each index
};

inline double* float64(const char* name, const Tensor& t, Lists& lists) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Double, "gam_fused: ", name, " must be float64, got ", describe(t));
  lists.check_device(name, t);
  return static_cast<double*>(t.mutable_data_ptr());
}

// The coefficient table, with a row for every param group of the layout.
inline const double* coefficients_of(const Tensor& t, Lists& lists) {
  const double* data = float64("coefficients", t, lists);
  STD_TORCH_CHECK(t.dim() == 2 && t.size(1) == COLUMNS && t.is_contiguous(),
                  "gam_fused: coefficients must be [groups, ", COLUMNS, "], contiguous, got ", describe(t));
  int64_t last = 0;
  for (int64_t i = 0; i < lists.tensors(); ++i) last = std::max(last, lists.groups()[i]);
  STD_TORCH_CHECK(last < t.size(0), "gam_fused: coefficients have ", t.size(0), " rows, the layout names group ", last);
  return data;
}

inline double* control_of(const Tensor& t, Lists& lists) {
  double* data = float64("control", t, lists);
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == CONTROLS && t.is_contiguous(), "gam_fused: control must be [", CONTROLS,
                  "], contiguous, got ", describe(t));
  return data;
}

// float64 partial sums: [rows, columns], or [columns], with unit stride and at least `columns` columns.
inline Matrix sums_of(const char* name, const Tensor& t, int64_t columns, std::initializer_list<int64_t> rows,
                      Lists& lists) {
  double* data = float64(name, t, lists);
  const int64_t last = t.dim() - 1;
  STD_TORCH_CHECK((last == 0 || last == 1) && t.size(last) >= columns && (t.size(last) == 1 || t.stride(last) == 1),
                  "gam_fused: ", name, " must have at least ", columns, " columns of unit stride, got ", describe(t));
  const int64_t count = last ? t.size(0) : 1;
  STD_TORCH_CHECK(std::find(rows.begin(), rows.end(), count) != rows.end(), "gam_fused: ", name, " must have ",
                  *rows.begin(), " rows", rows.size() > 1 ? " (or 6, see the verb)" : "", ", got ", describe(t));
  STD_TORCH_CHECK(count == 1 || t.stride(0) >= t.size(last), "gam_fused: ", name,
                  " must have rows that do not overlap in memory, got ", describe(t));
  return {data, count, t.size(last), last ? t.stride(0) : 0};
}

}  // namespace gam
