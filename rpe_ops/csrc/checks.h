// Checks of the arguments, one message per rule; the same for every device.

#pragma once

#include <ATen/core/Tensor.h>

namespace rpe_ops {

// Checks values (..., L_q, N) and bucket ids (L_q, L_k) on the same device.
inline void check_arguments(const char* name, const at::Tensor& values,
                            const at::Tensor& bucket_ids) {
  TORCH_CHECK_VALUE(values.is_floating_point() && values.dim() >= 2, name,
                    " must be a floating-point tensor of shape (..., L_q, N), got ",
                    values.scalar_type(), " of shape ", values.sizes());
  TORCH_CHECK_VALUE(bucket_ids.scalar_type() == at::kInt || bucket_ids.scalar_type() == at::kLong,
                    "bucket_ids must be int32 or int64, got ", bucket_ids.scalar_type());
  TORCH_CHECK_VALUE(bucket_ids.dim() == 2 && bucket_ids.size(0) == values.size(-2),
                    "bucket_ids must have shape (L_q, L_k) with L_q = ", values.size(-2), ", got ",
                    bucket_ids.sizes());
  TORCH_CHECK_VALUE(bucket_ids.device() == values.device(),
                    "bucket_ids must be on the device of the values, ", values.device(), ", got ",
                    bucket_ids.device());
}

inline void check_pairs(const at::Tensor& pairs, const at::Tensor& bucket_ids,
                        int64_t num_buckets) {
  check_arguments("pairs", pairs, bucket_ids);
  TORCH_CHECK_VALUE(bucket_ids.size(1) == pairs.size(-1),
                    "bucket_ids must have as many keys as pairs, ", pairs.size(-1), ", got ",
                    bucket_ids.size(1));
  TORCH_CHECK_VALUE(num_buckets >= 1, "num_buckets must be at least 1, got ", num_buckets);
}

// Returns an empty tensor like `values` with another last dimension.
inline at::Tensor empty_result(const at::Tensor& values, int64_t last) {
  auto shape = values.sizes().vec();
  shape.back() = last;
  return at::empty(shape, values.options());
}

}  // namespace rpe_ops
