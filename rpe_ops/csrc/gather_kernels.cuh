// Kernels of gather and bucket sum, deterministic and without atomics. The equations are in
// gather.cpp.
//
// A row is one query i of one slice n, and r = i * num_slices + n. So adjacent rows have the same
// query and read its bucket ids from the cache.

#pragma once

#include <c10/macros/Macros.h>

#include <cstdint>

namespace rpe_ops {

constexpr int kWarp = 32;
// A warp sums 4 rows at once with 8 lanes each: 8 adjacent float32 keys fill one 32-byte sector.
constexpr int kLanesPerRow = 8;
constexpr int kRowsPerWarp = kWarp / kLanesPerRow;
// Keys that a lane loads before it adds them, so that several loads are in flight.
constexpr int kUnroll = 4;

// Values (outer, inner, L_q, *) with their strides in elements.
struct Slices {
  int64_t num_slices, inner;
  int64_t outer_stride, inner_stride, query_stride, last_stride;

  __device__ int64_t offset(int64_t n, int64_t i) const {
    return n / inner * outer_stride + n % inner * inner_stride + i * query_stride;
  }
};

// Bucket ids (L_q, L_k) with their strides in elements.
template <typename index_t>
struct BucketIds {
  const index_t* data;
  int64_t num_queries, num_keys, query_stride, key_stride;

  __device__ int64_t operator()(int64_t i, int64_t j) const {
    return data[i * query_stride + j * key_stride];
  }
};

template <typename T, typename index_t>
__global__ void gather_kernel(const T* __restrict__ lookup, Slices slices,
                              BucketIds<index_t> bucket_ids, int64_t num_buckets,
                              T* __restrict__ out) {
  const int64_t num_rows = bucket_ids.num_queries * slices.num_slices;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t r = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; r < num_rows;
       r += stride) {
    const int64_t i = r / slices.num_slices, n = r % slices.num_slices;
    const T* row = lookup + slices.offset(n, i);
    T* out_row = out + (n * bucket_ids.num_queries + i) * bucket_ids.num_keys;
    for (int64_t j = threadIdx.x; j < bucket_ids.num_keys; j += kWarp) {
      const int64_t id = bucket_ids(i, j);
      CUDA_KERNEL_ASSERT(id >= 0 && id < num_buckets && "bucket id out of range");
      out_row[j] = row[id * slices.last_stride];
    }
  }
}

// One warp sums kRowsPerWarp rows in `sums` (buckets, kWarp). Each lane has its own column, so no
// two lanes share a sum or a bank. Then the columns of a row are added in a fixed order. Buckets
// [first, first + count) fit into shared memory; the pairs are read once for every such chunk.
template <typename T, typename sum_t, typename index_t>
__device__ void sum_chunk(const T* row, int64_t key_stride, const BucketIds<index_t>& bucket_ids,
                          int64_t i, bool live, int64_t first, int count, int64_t num_buckets,
                          sum_t* sums, T* out_row) {
  const int lane = threadIdx.x, part = lane % kLanesPerRow;
  for (int k = 0; k < count; ++k) sums[k * kWarp + lane] = 0;
  for (int64_t start = part; live && start < bucket_ids.num_keys; start += kUnroll * kLanesPerRow) {
    T values[kUnroll];
    int64_t ids[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t j = start + u * kLanesPerRow;
      const bool inside = j < bucket_ids.num_keys;
      ids[u] = inside ? bucket_ids(i, j) : first;
      values[u] = inside ? row[j * key_stride] : T(0);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      CUDA_KERNEL_ASSERT(ids[u] >= 0 && ids[u] < num_buckets && "bucket id out of range");
      const int64_t k = ids[u] - first;
      if (k >= 0 && k < count) sums[k * kWarp + lane] += static_cast<sum_t>(values[u]);
    }
  }
  __syncwarp();
  for (int k = part; live && k < count; k += kLanesPerRow) {
    sum_t sum = 0;
#pragma unroll
    for (int other = 0; other < kLanesPerRow; ++other) {
      // Each lane starts at a different column, so that the lanes read from different banks.
      sum += sums[k * kWarp + lane - part + (other + part) % kLanesPerRow];
    }
    out_row[first + k] = static_cast<T>(sum);
  }
  __syncwarp();
}

template <typename T, typename sum_t, typename index_t>
__global__ void bucket_sum_kernel(const T* __restrict__ pairs, Slices slices,
                                  BucketIds<index_t> bucket_ids, int64_t num_buckets, int chunk,
                                  T* __restrict__ out) {
  extern __shared__ __align__(16) unsigned char shared[];
  sum_t* sums = reinterpret_cast<sum_t*>(shared) + threadIdx.y * chunk * kWarp;
  const int64_t num_rows = bucket_ids.num_queries * slices.num_slices;
  const int64_t num_tasks = (num_rows + kRowsPerWarp - 1) / kRowsPerWarp;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t task = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
       task < num_tasks; task += stride) {
    const int64_t r = task * kRowsPerWarp + threadIdx.x / kLanesPerRow;
    const bool live = r < num_rows;
    const int64_t i = live ? r / slices.num_slices : 0, n = live ? r % slices.num_slices : 0;
    const T* row = pairs + slices.offset(n, i);
    T* out_row = out + (n * bucket_ids.num_queries + i) * num_buckets;
    for (int64_t first = 0; first < num_buckets; first += chunk) {
      const int count = static_cast<int>(min(static_cast<int64_t>(chunk), num_buckets - first));
      sum_chunk(row, slices.last_stride, bucket_ids, i, live, first, count, num_buckets, sums,
                out_row);
    }
  }
}

}  // namespace rpe_ops
