// Inputs of the forward and the backward of attention, checked and in the dtype of computation.
// Notation: rpe_ops/README.md.

#pragma once

#include <ATen/Functions.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "dropout.h"
#include "grid.h"
#include "vectors.h"

namespace rpe_ops {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// A tile of this many logits and its gradient fit into the second-level cache together.
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

// Converts to `wide` and makes the last dimension contiguous. Other strides are kept, even zero.
inline Tensor widen(const Tensor& x, at::ScalarType wide) {
  const Tensor converted = x.to(wide);
  return converted.stride(-1) == 1 || converted.size(-1) == 1 ? converted : converted.contiguous();
}

// A table: (Hs, d, terms x K) for queries or keys, or a bias (Hs, terms x K); for values
// (Hs, terms x K, d). Hs is 1 or the number of heads.
struct Table {
  Tensor values;

  bool is_bias() const { return values.dim() == 2; }
  Tensor of_head(int64_t head) const { return values[values.size(0) == 1 ? 0 : head]; }
};
using OptionalTable = std::optional<Table>;

struct Inputs {
  Tensor q, k, v;                           // (B, H, L, d)
  OptionalTable table_k, table_q, table_v;
  OptionalTensor padding;  // (B, L)
  Tensor row_base, local;  // axis offsets, kept because `grid` points to their values
  Grid grid;
  Dropout dropout;
  double scale;
  at::ScalarType narrow;  // dtype of the arguments

  int64_t heads() const { return q.size(1); }
  int64_t slices() const { return q.size(0) * heads(); }
  int64_t tokens() const { return q.size(2); }
  // Query rows of one tile.
  int64_t block() const { return std::clamp<int64_t>(kTileElements / tokens(), 8, tokens()); }
  int64_t blocks() const { return (tokens() + block() - 1) / block(); }
  // Rows of one head of x (B, H, rows, n), as a matrix.
  Tensor rows(const Tensor& x, int64_t bh, int64_t begin, int64_t count) const {
    const int64_t offset = bh / heads() * x.stride(0) + bh % heads() * x.stride(1) +
                           begin * x.stride(2) + x.storage_offset();
    return x.as_strided({count, x.size(3)}, {x.stride(2), x.stride(3)}, offset);
  }
  Tensor slice(const Tensor& x, int64_t bh) const { return rows(x, bh, 0, x.size(2)); }
  Tensor slice(const Table& table, int64_t bh) const { return table.of_head(bh % heads()); }
  template <typename scalar_t>
  scalar_t* data(const Tensor& x, int64_t bh) const {
    return static_cast<scalar_t*>(x.data_ptr()) + bh / heads() * x.stride(0) +
           bh % heads() * x.stride(1);
  }
};

// Returns the allowed shapes of a table, for a message.
inline std::string table_shapes(const Inputs& in, bool of_values) {
  const int64_t lookups = in.grid.lookups(), dim = in.q.size(3);
  std::ostringstream text;
  text << "(1 or " << in.heads() << ", ";
  if (of_values) {
    text << lookups << ", " << dim << ")";
  } else {
    text << dim << ", " << lookups << ") or (1 or " << in.heads() << ", " << lookups << ")";
  }
  return text.str();
}

inline OptionalTable make_table(const char* name, const OptionalTensor& values, const Inputs& in,
                                bool of_values) {
  if (!values) return std::nullopt;
  const int64_t lookups = in.grid.lookups(), dim = in.q.size(3);
  const bool bias = values->dim() == 2 && !of_values;
  TORCH_CHECK_VALUE((bias || values->dim() == 3) &&
                        (values->size(0) == 1 || values->size(0) == in.heads()) &&
                        values->size(of_values ? 1 : -1) == lookups &&
                        (bias || values->size(of_values ? 2 : 1) == dim),
                    name, " must have shape ", table_shapes(in, of_values), ", got ",
                    values->sizes());
  check_tensor(name, *values, values->sizes(), in.narrow, in.q.device());
  return Table{values->to(in.q.scalar_type()).contiguous()};
}

inline Inputs make_inputs(const Tensor& q, const Tensor& k, const Tensor& v,
                          const OptionalTensor& table_k, const OptionalTensor& table_q,
                          const OptionalTensor& table_v, const Tensor& row_base,
                          const Tensor& local, int64_t height, int64_t width, int64_t skip,
                          int64_t num_buckets, const OptionalTensor& padding, const Tensor& seed,
                          double scale, double dropout_p) {
  const auto dtype = q.scalar_type();
  const auto device = q.device();
  check_grid(row_base, local, height, width, skip, num_buckets, device);
  TORCH_CHECK_VALUE(is_supported(dtype) && q.dim() == 4 && q.size(2) == skip + height * width &&
                        q.size(3) >= 1,
                    "q must be a tensor of float16, bfloat16, float32 or float64 and shape "
                    "(B, H, L, d), L = ",
                    skip + height * width, " for this grid, got ", dtype, " of shape ", q.sizes());
  check_memory("q", q, device);
  check_tensor("k", k, q.sizes(), dtype, device);
  check_tensor("v", v, q.sizes(), dtype, device);
  if (padding) check_tensor("key_padding", *padding, {q.size(0), q.size(2)}, at::kBool, device);
  check_tensor("seed", seed, {1}, at::kLong, device);
  TORCH_CHECK_VALUE(std::isfinite(scale), "scale must be finite, got ", scale);
  TORCH_CHECK_VALUE(dropout_p >= 0 && dropout_p < 1, "dropout_p must be in [0, 1), got ",
                    dropout_p);
  const Tensor bases = row_base.contiguous(), locals = local.contiguous();
  const Grid grid = make_grid(bases, locals, height, width, skip, num_buckets);
  const auto wide = wide_type(q);
  const Dropout dropout{static_cast<uint64_t>(seed.item<int64_t>()), dropout_p};
  Inputs in{q.to(wide), k.to(wide), v.to(wide), {}, {}, {},
            padding ? OptionalTensor(padding->contiguous()) : padding, bases, locals, grid, dropout,
            scale, dtype};
  in.table_k = make_table("table_k", table_k, in, false);
  in.table_q = make_table("table_q", table_q, in, false);
  in.table_v = make_table("table_v", table_v, in, true);
  return in;
}

// Memory for the lookups of all tokens or for their gradients, (tokens, terms x K) per head, of the
// heads of one thread.
// With several blocks the thread computes all its heads for one block, then for the next block, so
// every head needs memory of its own. With a single block all heads share the memory of one.
class HeadScratch {
 public:
  HeadScratch() = default;
  HeadScratch(const Inputs& in, int64_t from, int64_t until)
      : from_(from), single_(in.blocks() == 1) {
    values_ = at::empty({single_ ? 1 : until - from, in.tokens(), in.grid.lookups()},
                        in.q.options());
  }
  Tensor of(int64_t bh) const { return values_[single_ ? 0 : bh - from_]; }

 private:
  Tensor values_;
  int64_t from_ = 0;
  bool single_ = true;
};

// Memory of one thread for the lookups, which are products with the tables.
struct Lookups {
  Tensor of_queries;    // (rows of a block, terms x K)
  HeadScratch of_keys;

  Lookups(const Inputs& in, int64_t from, int64_t until) {
    if (in.table_k && !in.table_k->is_bias()) {
      of_queries = at::empty({in.block(), in.grid.lookups()}, in.q.options());
    }
    if (in.table_q && !in.table_q->is_bias()) of_keys = HeadScratch(in, from, until);
  }
};

// Bucket ids of the pairs of a block of queries, (rows, terms, tokens); the same for every head.
struct BlockBuckets {
  std::vector<int> of_queries, of_keys;  // bucket(i, j) and bucket(j, i)
  int64_t begin, rows, terms, tokens;

  BlockBuckets(const Inputs& in, int64_t begin, int64_t rows, bool needs_query_ids)
      : begin(begin), rows(rows), terms(in.grid.terms), tokens(in.tokens()) {
    const auto fill = [&](std::vector<int>& ids, bool needed, bool from_key) {
      ids.resize(needed ? rows * stride() : 0);
      for (int64_t r = 0; needed && r < rows; ++r) {
        fill_bucket_ids(ids.data() + r * stride(), in.grid, begin + r, from_key);
      }
    };
    fill(of_queries, needs_query_ids, false);
    fill(of_keys, in.table_q.has_value(), true);
  }

  int64_t stride() const { return terms * tokens; }
  const int* query_row(int64_t r, int64_t t) const {
    return of_queries.data() + r * stride() + t * tokens;
  }
  const int* key_row(int64_t r, int64_t t) const {
    return of_keys.data() + r * stride() + t * tokens;
  }
};

// The lookup of every token; with a bias all tokens have the same one, and the stride is 0.
template <typename scalar_t>
struct Rows {
  const scalar_t* data = nullptr;
  int64_t stride = 0;

  Rows() = default;
  explicit Rows(const Tensor& values)
      : data(values.const_data_ptr<scalar_t>()),
        stride(values.dim() == 1 ? 0 : values.stride(0)) {}
};

template <typename scalar_t>
Rows<scalar_t> rows_of_queries(const Lookups& lookups, const Inputs& in, int64_t bh,
                               const BlockBuckets& block) {
  if (!in.table_k) return {};
  const Tensor table = in.slice(*in.table_k, bh);
  if (in.table_k->is_bias()) return Rows<scalar_t>(table);
  Tensor values = lookups.of_queries.narrow(0, 0, block.rows);
  at::addmm_out(values, values, in.rows(in.q, bh, block.begin, block.rows), table, 0, in.scale);
  return Rows<scalar_t>(values);
}

template <typename scalar_t>
Rows<scalar_t> rows_of_keys(const Lookups& lookups, const Inputs& in, int64_t bh,
                            const BlockBuckets& block) {
  if (!in.table_q) return {};
  const Tensor table = in.slice(*in.table_q, bh);
  if (in.table_q->is_bias()) return Rows<scalar_t>(table);
  Tensor values = lookups.of_keys.of(bh);
  if (block.begin == 0) at::addmm_out(values, values, in.slice(in.k, bh), table, 0, in.scale);
  return Rows<scalar_t>(values);
}

// Writes the logits of a block of queries of one head to `tile` (rows, tokens).
template <typename scalar_t>
void fill_logits(Tensor tile, const Lookups& lookups, const Inputs& in, int64_t bh,
                 const BlockBuckets& block) {
  const int64_t tokens = in.tokens();
  const Tensor q = in.rows(in.q, bh, block.begin, block.rows);
  at::addmm_out(tile, tile, q, in.slice(in.k, bh).t(), 0, in.scale);
  const auto of_queries = rows_of_queries<scalar_t>(lookups, in, bh, block);
  const auto of_keys = rows_of_keys<scalar_t>(lookups, in, bh, block);
  const bool* padding =
      in.padding ? in.padding->const_data_ptr<bool>() + bh / in.heads() * tokens : nullptr;
  scalar_t* logits = tile.mutable_data_ptr<scalar_t>();
  for (int64_t r = 0; r < block.rows; ++r, logits += tokens) {
    for (int64_t t = 0; t < block.terms; ++t) {
      if (of_queries.data) {
        add_gathered(logits, of_queries.data + r * of_queries.stride, block.query_row(r, t),
                     tokens);
      }
      if (of_keys.data) {
        add_gathered_of_keys(logits, of_keys.data, of_keys.stride, block.key_row(r, t), tokens);
      }
    }
    for (int64_t j = 0; padding && j < tokens; ++j) {
      if (padding[j]) logits[j] = -std::numeric_limits<scalar_t>::infinity();
    }
  }
}

}  // namespace rpe_ops
