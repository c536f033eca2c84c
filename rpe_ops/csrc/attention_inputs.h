// What the forward and the backward of attention both read, checked and in the dtype of computation.

#pragma once

#include <ATen/Functions.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <vector>

#include "dropout.h"
#include "grid.h"
#include "vectors.h"

namespace rpe_ops {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// A tile of this many logits stays in the second-level cache beside its gradient.
constexpr int64_t kTileElements = 65536;

struct Dropout {
  uint64_t seed;
  double p;

  template <typename scalar_t>
  void fill(scalar_t* factors, int64_t count, int64_t i, int64_t bh) const {
    const auto [k0, k1] = philox(seed, static_cast<uint32_t>(i), static_cast<uint32_t>(bh));
    fill_dropout(factors, count, k0, k1, static_cast<uint32_t>(p * 4294967296.0),
                 static_cast<scalar_t>(1.0 / (1.0 - p)));
  }
};

inline at::ScalarType wide_type(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// Converted, and contiguous along the last dimension; other strides, also zero ones, are kept.
inline OptionalTensor widen(const OptionalTensor& x, at::ScalarType wide) {
  if (!x) return x;
  const Tensor converted = x->to(wide);
  return converted.stride(-1) == 1 || converted.size(-1) == 1 ? converted : converted.contiguous();
}

struct Inputs {
  Tensor q, k, v;                    // (B, H, L, d)
  OptionalTensor lookup_k, lookup_q;  // (B, H, L, terms x K)
  OptionalTensor padding;            // (B, L)
  Tensor row_base, local;
  Grid grid;
  Dropout dropout;
  double scale;

  int64_t heads() const { return q.size(1); }
  int64_t slices() const { return q.size(0) * heads(); }
  int64_t tokens() const { return q.size(2); }
  // Query rows of one tile.
  int64_t block() const { return std::clamp<int64_t>(kTileElements / tokens(), 8, tokens()); }
  Tensor slice(const Tensor& x, int64_t bh) const { return x[bh / heads()][bh % heads()]; }
  template <typename scalar_t>
  scalar_t* data(const OptionalTensor& x, int64_t bh) const {
    if (!x) return nullptr;
    return static_cast<scalar_t*>(x->data_ptr()) + bh / heads() * x->stride(0) +
           bh % heads() * x->stride(1);
  }
};

inline Inputs make_inputs(const Tensor& q, const Tensor& k, const Tensor& v,
                          const OptionalTensor& lookup_k, const OptionalTensor& lookup_q,
                          const Tensor& row_base, const Tensor& local, int64_t height,
                          int64_t width, int64_t skip, int64_t num_buckets,
                          const OptionalTensor& padding, const Tensor& seed, double scale,
                          double dropout_p) {
  const Tensor bases = row_base.contiguous(), locals = local.contiguous();
  const Grid grid = make_grid(bases, locals, height, width, skip, num_buckets);
  TORCH_CHECK_VALUE(q.dim() == 4 && q.size(2) == grid.tokens() && k.sizes() == q.sizes() &&
                        v.sizes() == q.sizes(),
                    "q, k and v must be (B, H, ", grid.tokens(), ", d), got ", q.sizes(), ", ",
                    k.sizes(), " and ", v.sizes());
  for (const auto& lookup : {lookup_k, lookup_q}) {
    TORCH_CHECK_VALUE(!lookup || (lookup->sizes().slice(0, 3) == q.sizes().slice(0, 3) &&
                                  lookup->size(3) == grid.lookups()),
                      "a lookup must be (B, H, L, ", grid.lookups(), "), got ", lookup->sizes());
  }
  TORCH_CHECK_VALUE(!padding || (padding->dim() == 2 && padding->size(0) == q.size(0) &&
                                 padding->size(1) == q.size(2)),
                    "key_padding must be (B, L), got ", padding->sizes());
  const auto wide = wide_type(q);
  const Dropout dropout{static_cast<uint64_t>(seed.item<int64_t>()), dropout_p};
  return {q.to(wide), k.to(wide), v.to(wide), widen(lookup_k, wide), widen(lookup_q, wide),
          padding ? OptionalTensor(padding->contiguous()) : padding, bases, locals, grid, dropout,
          scale};
}

// Buckets of the pairs of a block of queries, (rows, terms, tokens); the same for every head.
struct BlockIndex {
  std::vector<int> of_queries, of_keys;  // bucket(i, j) and bucket(j, i)
  int64_t begin, rows, terms, tokens;

  BlockIndex(const Inputs& in, int64_t begin, int64_t rows, bool of_queries_needed)
      : begin(begin), rows(rows), terms(in.grid.terms), tokens(in.tokens()) {
    const auto fill = [&](std::vector<int>& index, bool needed, bool from_key) {
      index.resize(needed ? rows * stride() : 0);
      for (int64_t r = 0; needed && r < rows; ++r) {
        fill_index(index.data() + r * stride(), in.grid, begin + r, from_key);
      }
    };
    fill(of_queries, of_queries_needed, false);
    fill(of_keys, in.lookup_q.has_value(), true);
  }

  int64_t stride() const { return terms * tokens; }
  const int* query_row(int64_t r, int64_t t) const {
    return of_queries.data() + r * stride() + t * tokens;
  }
  const int* key_row(int64_t r, int64_t t) const {
    return of_keys.data() + r * stride() + t * tokens;
  }
};

// exp(logits - shift) of a block of queries of one head, written to `tile` (rows, tokens), where
// shift(r, logits) is a number for row r. One of -inf, of a row that attends nowhere, is taken for 0.
template <typename scalar_t, typename Shift>
void fill_exponentials(Tensor tile, const Inputs& in, int64_t bh, const BlockIndex& index,
                       const Shift& shift) {
  const int64_t tokens = in.tokens();
  const Tensor q = in.slice(in.q, bh).narrow(0, index.begin, index.rows);
  at::addmm_out(tile, tile, q, in.slice(in.k, bh).t(), 0, in.scale);
  const scalar_t* of_queries = in.data<scalar_t>(in.lookup_k, bh);
  const scalar_t* of_keys = in.data<scalar_t>(in.lookup_q, bh);
  const bool* padding =
      in.padding ? in.padding->const_data_ptr<bool>() + bh / in.heads() * tokens : nullptr;
  scalar_t* logits = tile.mutable_data_ptr<scalar_t>();
  for (int64_t r = 0; r < index.rows; ++r, logits += tokens) {
    for (int64_t t = 0; t < index.terms; ++t) {
      if (of_queries) {
        const scalar_t* row = of_queries + (index.begin + r) * in.lookup_k->stride(2);
        add_gathered(logits, row, index.query_row(r, t), tokens);
      }
      if (of_keys) {
        const int64_t stride = in.lookup_q->stride(2);
        add_gathered_of_keys(logits, of_keys, stride, index.key_row(r, t), tokens);
      }
    }
    for (int64_t j = 0; padding && j < tokens; ++j) {
      if (padding[j]) logits[j] = -std::numeric_limits<scalar_t>::infinity();
    }
    const scalar_t by = shift(r, logits);
    if (by != -std::numeric_limits<scalar_t>::infinity()) subtract(logits, by, tokens);
  }
  tile.exp_();
}

}  // namespace rpe_ops
