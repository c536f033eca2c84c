// Gather and bucket sum on CUDA: choose a launch, launch on the current stream.

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <type_traits>

#include "checks.h"
#include "gather_kernels.cuh"

namespace rpe_ops {
namespace {

constexpr int kMaxWarps = 4;
// Shared memory that a block can use on every device without an attribute.
constexpr int64_t kSharedBytes = 48 * 1024;

// Returns `values` with exactly four dimensions. A permuted or expanded (B, H, L, K) is not copied.
// If there are more dimensions, those between the first and the last two are flattened, with a copy
// if their strides allow no view.
at::Tensor with_two_leading_dims(const at::Tensor& values) {
  if (values.dim() == 2) return values.unsqueeze(0).unsqueeze(0);
  if (values.dim() == 3) return values.unsqueeze(0);
  return values.dim() == 4 ? values : values.flatten(1, -3);
}

Slices slices_of(const at::Tensor& values) {
  return {values.size(0) * values.size(1), values.size(1),   values.stride(0),
          values.stride(1),                values.stride(2), values.stride(3)};
}

template <typename index_t>
BucketIds<index_t> bucket_ids_of(const at::Tensor& bucket_ids) {
  return {bucket_ids.const_data_ptr<index_t>(), bucket_ids.size(0), bucket_ids.size(1),
          bucket_ids.stride(0), bucket_ids.stride(1)};
}

unsigned num_blocks(int64_t tasks, int tasks_per_block) {
  const int64_t blocks = (tasks + tasks_per_block - 1) / tasks_per_block;
  return static_cast<unsigned>(std::min<int64_t>(blocks, std::numeric_limits<int32_t>::max()));
}

at::Tensor gather_cuda(const at::Tensor& lookup, const at::Tensor& bucket_ids) {
  check_arguments("lookup", lookup, bucket_ids);
  const c10::cuda::CUDAGuard guard(lookup.device());
  at::Tensor out = empty_result(lookup, bucket_ids.size(1));
  if (out.numel() == 0) return out;
  const at::Tensor values = with_two_leading_dims(lookup);
  const Slices slices = slices_of(values);
  const unsigned blocks = num_blocks(bucket_ids.size(0) * slices.num_slices, kMaxWarps);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, values.scalar_type(), "rpe_ops::gather", [&] {
        AT_DISPATCH_INDEX_TYPES(bucket_ids.scalar_type(), "rpe_ops::gather", [&] {
          gather_kernel<<<blocks, dim3(kWarp, kMaxWarps), 0, c10::cuda::getCurrentCUDAStream()>>>(
              values.const_data_ptr<scalar_t>(), slices, bucket_ids_of<index_t>(bucket_ids),
              lookup.size(-1), out.mutable_data_ptr<scalar_t>());
          C10_CUDA_KERNEL_LAUNCH_CHECK();
        });
      });
  return out;
}

at::Tensor bucket_sum_cuda(const at::Tensor& pairs, const at::Tensor& bucket_ids,
                           int64_t num_buckets) {
  check_pairs(pairs, bucket_ids, num_buckets);
  const c10::cuda::CUDAGuard guard(pairs.device());
  at::Tensor out = empty_result(pairs, num_buckets);
  if (out.numel() == 0) return out;
  const at::Tensor values = with_two_leading_dims(pairs);
  const Slices slices = slices_of(values);
  const int64_t num_rows = bucket_ids.size(0) * slices.num_slices;
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, values.scalar_type(), "rpe_ops::bucket_sum", [&] {
        using sum_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
        const int64_t bytes_per_bucket = kWarp * sizeof(sum_t);
        const int64_t chunk = std::min<int64_t>(num_buckets, kSharedBytes / bytes_per_bucket);
        const int warps =
            std::min<int64_t>(kMaxWarps, kSharedBytes / (chunk * bytes_per_bucket));
        const unsigned blocks =
            num_blocks((num_rows + kRowsPerWarp - 1) / kRowsPerWarp, warps);
        AT_DISPATCH_INDEX_TYPES(bucket_ids.scalar_type(), "rpe_ops::bucket_sum", [&] {
          bucket_sum_kernel<scalar_t, sum_t, index_t>
              <<<blocks, dim3(kWarp, warps), warps * chunk * bytes_per_bucket,
                 c10::cuda::getCurrentCUDAStream()>>>(
                  values.const_data_ptr<scalar_t>(), slices, bucket_ids_of<index_t>(bucket_ids),
                  num_buckets, static_cast<int>(chunk), out.mutable_data_ptr<scalar_t>());
          C10_CUDA_KERNEL_LAUNCH_CHECK();
        });
      });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(rpe_ops_cpp, CUDA, library) {
  library.impl("gather", gather_cuda);
  library.impl("bucket_sum", bucket_sum_cuda);
}

}  // namespace rpe_ops
