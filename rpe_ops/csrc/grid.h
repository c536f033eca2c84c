// Buckets of the pairs of tokens on a grid; see rpe_ops/grid.py.

#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>

#include "checks.h"

namespace rpe_ops {

struct Grid {
  // The axis offsets.
  const int* row_base;  // (terms, 2 height - 1)
  const int* local;     // (terms, local_rows, 2 width - 1)
  int64_t terms, local_rows, height, width, skip, num_buckets;

  int64_t tokens() const { return skip + height * width; }
  int64_t lookups() const { return terms * num_buckets; }
};

// Checks the sizes and the axis offsets of a grid, but not the values of the offsets.
inline void check_grid(const at::Tensor& row_base, const at::Tensor& local, int64_t height,
                       int64_t width, int64_t skip, int64_t num_buckets, at::Device device) {
  // The sizes are bounded so that no product of them overflows.
  constexpr int64_t most = int64_t{1} << 20;
  TORCH_CHECK_VALUE(height >= 1 && height <= most && width >= 1 && width <= most && skip >= 0 &&
                        skip <= most,
                    "height and width must be in [1, ", most, "] and skip in [0, ", most, "], got ",
                    height, ", ", width, " and ", skip);
  check_num_buckets(num_buckets);
  const int64_t rows = 2 * height - 1, columns = 2 * width - 1;
  TORCH_CHECK_VALUE(row_base.dim() == 2 && (row_base.size(0) == 1 || row_base.size(0) == 2),
                    "row_base must have shape (1 or 2, ", rows, "), got ", row_base.sizes());
  check_tensor("row_base", row_base, {row_base.size(0), rows}, at::kInt, device);
  const bool separable = local.dim() == 3 && local.size(1) == 1;
  check_tensor("local", local, {row_base.size(0), separable ? 1 : rows, columns}, at::kInt, device);
}

// Raises IndexError unless every bucket is in [0, num_buckets). The two tensors must be checked and
// contiguous and must outlive the grid.
inline Grid make_grid(const at::Tensor& row_base, const at::Tensor& local, int64_t height,
                      int64_t width, int64_t skip, int64_t num_buckets) {
  const Grid grid{row_base.const_data_ptr<int>(), local.const_data_ptr<int>(), row_base.size(0),
                  local.size(1), height, width, skip, num_buckets};
  for (int64_t t = 0; t < grid.terms; ++t) {
    for (int64_t r = 0; r < 2 * height - 1; ++r) {
      const int64_t row = t * grid.local_rows + (grid.local_rows > 1 ? r : 0);
      for (int64_t c = 0; c < 2 * width - 1; ++c) {
        const int64_t bucket = int64_t{grid.row_base[t * (2 * height - 1) + r]} +
                               grid.local[row * (2 * width - 1) + c];
        TORCH_CHECK_INDEX(bucket >= 0 && bucket < num_buckets,
                          "row_base + local must be in [0, ", num_buckets, "), got ", bucket);
      }
    }
  }
  return grid;
}

// Writes the bucket ids of token i with all tokens j to `ids` (terms, tokens): bucket(i, j), or
// bucket(j, i) with `from_key`.
inline void fill_bucket_ids(int* ids, const Grid& grid, int64_t i, bool from_key) {
  const int64_t rows = 2 * grid.height - 1, cols = 2 * grid.width - 1;
  const int64_t row_i = (i - grid.skip) / grid.width, col_i = (i - grid.skip) % grid.width;
  for (int64_t t = 0; t < grid.terms; ++t) {
    const int term = static_cast<int>(t * grid.num_buckets);
    const int extra = term + static_cast<int>(grid.num_buckets) - 1;
    const int64_t constant = i < grid.skip ? grid.tokens() : grid.skip;
    ids = std::fill_n(ids, constant, extra);
    for (int64_t row_j = 0; i >= grid.skip && row_j < grid.height; ++row_j) {
      const int64_t dr = (from_key ? row_j - row_i : row_i - row_j) + grid.height - 1;
      const int base = term + grid.row_base[t * rows + dr];
      const int* local =
          grid.local + (t * grid.local_rows + (grid.local_rows > 1 ? dr : 0)) * cols;
      const int* middle = local + grid.width - 1;
      for (int64_t col_j = 0; col_j < grid.width; ++col_j) {
        *ids++ = base + middle[from_key ? col_j - col_i : col_i - col_j];
      }
    }
  }
}

}  // namespace rpe_ops
