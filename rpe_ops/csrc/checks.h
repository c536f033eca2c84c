// Checks of the arguments, one message per rule; the same for every device. The kernels read memory
// without further checks, so that every shape, dtype and range that they rely on is checked here.

#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>

namespace rpe_ops {

// Largest number of buckets of a term. Ids of both terms fit into 32 bits, and a mistaken number
// does not reserve all memory.
constexpr int64_t kMaxBuckets = int64_t{1} << 20;

inline bool is_supported(at::ScalarType dtype) {
  return dtype == at::kHalf || dtype == at::kBFloat16 || dtype == at::kFloat ||
         dtype == at::kDouble;
}

// Checks that the storage of a tensor on `device` holds all its elements. It does not after
// `untyped_storage().resize_()`.
inline void check_memory(const char* name, const at::Tensor& x, at::Device device) {
  TORCH_CHECK_VALUE(x.layout() == at::kStrided && x.device() == device, name,
                    " must be a dense tensor on the device of the first tensor, ", device,
                    ", got a tensor of layout ", x.layout(), " on ", x.device());
  const size_t needed = at::detail::computeStorageNbytes(x.sizes(), x.strides(), x.itemsize(),
                                                         x.storage_offset());
  TORCH_CHECK_VALUE(x.numel() == 0 || x.storage().nbytes() >= needed, name,
                    " must have a storage of at least ", needed, " bytes, got ",
                    x.storage().nbytes());
}

// Checks the shape and the dtype of an argument on `device`.
inline void check_tensor(const char* name, const at::Tensor& x, at::IntArrayRef sizes,
                         at::ScalarType dtype, at::Device device) {
  TORCH_CHECK_VALUE(x.sizes() == sizes && x.scalar_type() == dtype, name, " must be ", dtype,
                    " of shape ", sizes, ", got ", x.scalar_type(), " of shape ", x.sizes());
  check_memory(name, x, device);
}

inline void check_num_buckets(int64_t num_buckets) {
  TORCH_CHECK_VALUE(num_buckets >= 1 && num_buckets <= kMaxBuckets, "num_buckets must be in [1, ",
                    kMaxBuckets, "], got ", num_buckets);
}

// Checks values (..., L_q, N) and bucket ids (L_q, L_k) on the same device.
inline void check_arguments(const char* name, const at::Tensor& values,
                            const at::Tensor& bucket_ids) {
  TORCH_CHECK_VALUE(is_supported(values.scalar_type()) && values.dim() >= 2, name,
                    " must be a tensor of float16, bfloat16, float32 or float64 and shape "
                    "(..., L_q, N), got ",
                    values.scalar_type(), " of shape ", values.sizes());
  TORCH_CHECK_VALUE(bucket_ids.scalar_type() == at::kInt || bucket_ids.scalar_type() == at::kLong,
                    "bucket_ids must be int32 or int64, got ", bucket_ids.scalar_type());
  TORCH_CHECK_VALUE(bucket_ids.dim() == 2 && bucket_ids.size(0) == values.size(-2),
                    "bucket_ids must have shape (L_q, L_k) with L_q = ", values.size(-2), ", got ",
                    bucket_ids.sizes());
  check_memory(name, values, values.device());
  check_memory("bucket_ids", bucket_ids, values.device());
}

inline void check_pairs(const at::Tensor& pairs, const at::Tensor& bucket_ids,
                        int64_t num_buckets) {
  check_arguments("pairs", pairs, bucket_ids);
  TORCH_CHECK_VALUE(bucket_ids.size(1) == pairs.size(-1),
                    "bucket_ids must have as many keys as pairs, ", pairs.size(-1), ", got ",
                    bucket_ids.size(1));
  check_num_buckets(num_buckets);
}

// Returns an empty tensor like `values` with another last dimension.
inline at::Tensor empty_result(const at::Tensor& values, int64_t last) {
  auto shape = values.sizes().vec();
  shape.back() = last;
  return at::empty(shape, values.options());
}

}  // namespace rpe_ops
