// Gather and bucket sum on the CPU.
//
//     gather:      out[n, i, j] = lookup[n, i, bucket_ids[i, j]]
//     bucket sum:  out[n, i, k] = sum over j of [bucket_ids[i, j] = k] * pairs[n, i, j]
//
// n is the slice, the index over all leading dimensions, which may have any strides. A task is one
// query of up to kLanes slices, which share a checked copy of the query's bucket ids. One thread
// sums a row from its first key to its last, so the number of threads does not change the result.
// Notation: rpe_ops/README.md.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "checks.h"

namespace rpe_ops {
namespace {

// Slices of a task. Their sums are adjacent in memory, so that one key adds to all of them in a few
// vector instructions, and adjacent keys with the same bucket do not wait for each other.
constexpr int kLanes = 8;
// Pairs per thread; with fewer, starting a thread costs more than it saves.
constexpr int64_t kPairsPerThread = 1 << 15;

using Ids = std::vector<int32_t>;

// Returns the offset of every slice in elements, leading dimensions in row-major order.
std::vector<int64_t> slice_offsets(const at::Tensor& values) {
  std::vector<int64_t> offsets{0};
  for (int64_t d = 0; d < values.dim() - 2; ++d) {
    std::vector<int64_t> finer;
    finer.reserve(offsets.size() * values.size(d));
    for (int64_t offset : offsets) {
      for (int64_t x = 0; x < values.size(d); ++x) {
        finer.push_back(offset + x * values.stride(d));
      }
    }
    offsets = std::move(finer);
  }
  return offsets;
}

// Copies the bucket ids of one query; raises IndexError unless all are in [0, num_buckets).
template <typename index_t>
void read_ids(const index_t* row, int64_t stride, int64_t num_buckets, Ids& ids) {
  using unsigned_t = std::make_unsigned_t<index_t>;
  unsigned_t largest = 0;
  for (size_t j = 0; j < ids.size(); ++j) {
    const index_t id = row[static_cast<int64_t>(j) * stride];
    // A negative id becomes a very large unsigned one, so one comparison is enough.
    largest = std::max(largest, static_cast<unsigned_t>(id));
    ids[j] = static_cast<int32_t>(id);
  }
  TORCH_CHECK_INDEX(ids.empty() || largest < static_cast<uint64_t>(num_buckets),
                    "bucket_ids must be in [0, ", num_buckets, "), got ",
                    static_cast<index_t>(largest));
}

// Calls `make_visitor()(i, n, live, ids)` for query i of slices n to n + live, live <= kLanes.
// Every thread makes its own visitor, which may hold working memory.
template <typename MakeVisitor>
void for_each_row(const at::Tensor& bucket_ids, int64_t num_slices, int64_t num_buckets,
                  const MakeVisitor& make_visitor) {
  TORCH_CHECK_VALUE(num_buckets <= std::numeric_limits<int32_t>::max(),
                    "num_buckets must be at most 2^31 - 1, got ", num_buckets);
  const int64_t num_queries = bucket_ids.size(0), num_keys = bucket_ids.size(1);
  const int64_t num_tasks = (num_slices + kLanes - 1) / kLanes * num_queries;
  const int64_t grain = kPairsPerThread / (kLanes * (num_keys + 1)) + 1;
  AT_DISPATCH_INDEX_TYPES(bucket_ids.scalar_type(), "rpe_ops", [&] {
    const auto* data = bucket_ids.const_data_ptr<index_t>();
    at::parallel_for(0, num_tasks, grain, [&](int64_t begin, int64_t end) {
      auto visit = make_visitor();
      Ids ids(num_keys);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t i = task % num_queries, n = task / num_queries * kLanes;
        read_ids(data + i * bucket_ids.stride(0), bucket_ids.stride(1), num_buckets, ids);
        visit(i, n, std::min<int64_t>(kLanes, num_slices - n), ids);
      }
    });
  });
}

// Calls `f(stride)`. A stride of 1 is a compile-time constant, which saves the multiplication.
template <typename F>
void with_stride(int64_t stride, const F& f) {
  if (stride == 1) {
    f(std::integral_constant<int64_t, 1>());
  } else {
    f(stride);
  }
}

template <typename T>
void gather_row(const T* row, int64_t bucket_stride, const Ids& ids, T* out) {
  with_stride(bucket_stride, [&](auto stride) {
    for (size_t j = 0; j < ids.size(); ++j) out[j] = row[ids[j] * stride];
  });
}

// Adds one query of `width` slices to `sums` (K, width).
template <int width, typename T, typename sum_t>
void add_rows(const T* const* rows, int64_t key_stride, const Ids& ids, sum_t* sums) {
  // Local copies of the pointers can stay in registers, because nothing else points to them.
  const T* row[width];
  for (int s = 0; s < width; ++s) row[s] = rows[s];
  with_stride(key_stride, [&](auto stride) {
    for (size_t j = 0; j < ids.size(); ++j) {
      sum_t* sum = sums + static_cast<int64_t>(ids[j]) * width;
      for (int s = 0; s < width; ++s) {
        sum[s] += static_cast<sum_t>(row[s][static_cast<int64_t>(j) * stride]);
      }
    }
  });
}

// Sums one query of `live` slices. Lanes without a slice repeat the first and are not written.
template <typename T, typename sum_t>
void sum_rows(const T* const* rows, int64_t live, int64_t key_stride, const Ids& ids,
              int64_t num_buckets, std::vector<sum_t>& sums, T* out, int64_t slice_size) {
  const int width = live == 1 ? 1 : live <= kLanes / 2 ? kLanes / 2 : kLanes;
  std::fill_n(sums.begin(), num_buckets * width, sum_t(0));
  const auto add = width == 1        ? add_rows<1, T, sum_t>
                   : width == kLanes ? add_rows<kLanes, T, sum_t>
                                     : add_rows<kLanes / 2, T, sum_t>;
  add(rows, key_stride, ids, sums.data());
  for (int64_t s = 0; s < live; ++s) {
    for (int64_t k = 0; k < num_buckets; ++k) {
      out[s * slice_size + k] = static_cast<T>(sums[k * width + s]);
    }
  }
}

at::Tensor gather_cpu(const at::Tensor& lookup, const at::Tensor& bucket_ids) {
  check_arguments("lookup", lookup, bucket_ids);
  at::Tensor out = empty_result(lookup, bucket_ids.size(1));
  if (out.numel() == 0) return out;
  const auto offsets = slice_offsets(lookup);
  const int64_t slice_size = bucket_ids.numel(), row_size = bucket_ids.size(1);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, lookup.scalar_type(), "rpe_ops::gather", [&] {
        const auto* from = lookup.const_data_ptr<scalar_t>();
        auto* to = out.mutable_data_ptr<scalar_t>();
        const auto visit = [&](int64_t i, int64_t n, int64_t live, const Ids& ids) {
          for (int64_t s = n; s < n + live; ++s) {
            gather_row(from + offsets[s] + i * lookup.stride(-2), lookup.stride(-1), ids,
                       to + s * slice_size + i * row_size);
          }
        };
        for_each_row(bucket_ids, static_cast<int64_t>(offsets.size()), lookup.size(-1),
                     [&] { return visit; });
      });
  return out;
}

at::Tensor bucket_sum_cpu(const at::Tensor& pairs, const at::Tensor& bucket_ids,
                          int64_t num_buckets) {
  check_pairs(pairs, bucket_ids, num_buckets);
  at::Tensor out = empty_result(pairs, num_buckets);
  if (out.numel() == 0) return out;
  const auto offsets = slice_offsets(pairs);
  const int64_t slice_size = bucket_ids.size(0) * num_buckets;
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, pairs.scalar_type(), "rpe_ops::bucket_sum", [&] {
        using sum_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
        const auto* from = pairs.const_data_ptr<scalar_t>();
        auto* to = out.mutable_data_ptr<scalar_t>();
        const auto make_visitor = [&] {
          return [&, sums = std::vector<sum_t>(num_buckets * kLanes)](
                     int64_t i, int64_t n, int64_t live, const Ids& ids) mutable {
            const scalar_t* rows[kLanes];
            for (int64_t s = 0; s < kLanes; ++s) {
              rows[s] = from + offsets[n + (s < live ? s : 0)] + i * pairs.stride(-2);
            }
            sum_rows(rows, live, pairs.stride(-1), ids, num_buckets, sums,
                     to + n * slice_size + i * num_buckets, slice_size);
          };
        };
        for_each_row(bucket_ids, static_cast<int64_t>(offsets.size()), num_buckets, make_visitor);
      });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(rpe_ops_cpp, CPU, library) {
  library.impl("gather", gather_cpu);
  library.impl("bucket_sum", bucket_sum_cpu);
}

}  // namespace rpe_ops
