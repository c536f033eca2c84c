// Checks of the arguments, one message per rule; the same for every device.

#pragma once

#include <ATen/core/Tensor.h>

namespace rpe_ops {

// Values are (..., L_q, N), the index is (L_q, L_k) on the same device.
inline void check_arguments(const char* name, const at::Tensor& values, const at::Tensor& index) {
  TORCH_CHECK_VALUE(values.is_floating_point() && values.dim() >= 2, name,
                    " must be a floating-point tensor of shape (..., L_q, N), got ",
                    values.scalar_type(), " of shape ", values.sizes());
  TORCH_CHECK_VALUE(index.scalar_type() == at::kInt || index.scalar_type() == at::kLong,
                    "index must be int32 or int64, got ", index.scalar_type());
  TORCH_CHECK_VALUE(index.dim() == 2 && index.size(0) == values.size(-2),
                    "index must have shape (L_q, L_k) with L_q = ", values.size(-2), ", got ",
                    index.sizes());
  TORCH_CHECK_VALUE(index.device() == values.device(), "index is on ", index.device(),
                    ", the values are on ", values.device());
}

inline void check_pairs(const at::Tensor& pairs, const at::Tensor& index, int64_t num_buckets) {
  check_arguments("pairs", pairs, index);
  TORCH_CHECK_VALUE(index.size(1) == pairs.size(-1), "index has ", index.size(1),
                    " keys, pairs has ", pairs.size(-1), ": they must be equal");
  TORCH_CHECK_VALUE(num_buckets >= 1, "num_buckets must be at least 1, got ", num_buckets);
}

// `values` with its last dimension replaced.
inline at::Tensor empty_result(const at::Tensor& values, int64_t last) {
  auto shape = values.sizes().vec();
  shape.back() = last;
  return at::empty(shape, values.options());
}

}  // namespace rpe_ops
