// Fused attention with encodings on the CPU. The equations are in rpe_ops/reference.py and
// rpe_ops/tables.py, the notation in rpe_ops/README.md.
//
// A tile holds the logits of a block of queries of one head and stays in the cache, so nothing of
// size L x L is held. torch computes the matrix products. The backward recomputes the weights from
// the logarithm of the row sums. One thread computes a whole head, because all queries of the head
// add to the gradients of its keys and values. So no atomics are needed, and every run gives the
// same bits.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <cmath>
#include <tuple>

#include "attention_inputs.h"

namespace rpe_ops {
namespace {

// Calls body(block, bh) for every block of queries and every head in [from, to).
template <typename Body>
void for_each_block(const Inputs& in, int64_t from, int64_t to, bool needs_query_ids,
                    const Body& body) {
  for (int64_t begin = 0; begin < in.tokens(); begin += in.block()) {
    const BlockBuckets block(in, begin, std::min(in.block(), in.tokens() - begin), needs_query_ids);
    for (int64_t bh = from; bh < to; ++bh) body(block, bh);
  }
}

struct Outputs {
  Tensor out;           // (B, H, L, d)
  OptionalTensor sums;  // (B, H, L, terms x K)
  Tensor lse;           // (B, H, L)
};

template <typename scalar_t>
void forward_block(Tensor tile, const Lookups& lookups, const Inputs& in, const BlockBuckets& block,
                   int64_t bh, const Outputs& to) {
  const int64_t tokens = in.tokens(), rows = block.rows, width = in.grid.lookups();
  fill_logits<scalar_t>(tile, lookups, in, bh, block);
  scalar_t* weights = tile.mutable_data_ptr<scalar_t>();
  scalar_t* lse = in.data<scalar_t>(to.lse, bh) + block.begin;
  std::vector<scalar_t> share(rows), factors(in.dropout.p > 0 ? tokens : 0);
  for (int64_t r = 0; r < rows; ++r) {
    scalar_t* row = weights + r * tokens;
    const scalar_t shift = largest(row, tokens), sum = exponentials(row, shift, tokens);
    lse[r] = shift + std::log(sum);
    share[r] = sum == 0 ? 0 : 1 / sum;
    if (factors.empty()) continue;
    in.dropout.fill(factors.data(), tokens, block.begin + r, bh);
    multiply(row, factors.data(), tokens);
  }
  Tensor out = in.rows(to.out, bh, block.begin, rows);
  at::mm_out(out, tile, in.slice(in.v, bh));
  if (to.sums) {
    Tensor sums = in.rows(*to.sums, bh, block.begin, rows);
    scalar_t* values = sums.mutable_data_ptr<scalar_t>();
    std::fill_n(values, rows * width, scalar_t(0));
    for (int64_t t = 0; t < block.terms; ++t) {
      add_to_buckets(values, width, weights, tokens, block.query_row(0, t), block.stride(), rows,
                     tokens);
    }
    at::addmm_out(out, out, sums, in.slice(*in.table_v, bh));
    for (int64_t r = 0; r < rows; ++r) multiply(values + r * width, share[r], width);
  }
  scalar_t* values = out.mutable_data_ptr<scalar_t>();
  for (int64_t r = 0; r < rows; ++r) multiply(values + r * out.stride(0), share[r], out.size(1));
}

std::tuple<Tensor, Tensor, Tensor> attention_forward(
    const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& table_k,
    const OptionalTensor& table_q, const OptionalTensor& table_v, const Tensor& row_base,
    const Tensor& local, int64_t height, int64_t width, int64_t skip, int64_t num_buckets,
    const OptionalTensor& key_padding, const Tensor& seed, double scale, double dropout_p) {
  const Inputs in = make_inputs(q, k, v, table_k, table_q, table_v, row_base, local, height, width,
                                skip, num_buckets, key_padding, seed, scale, dropout_p);
  const int64_t batch = q.size(0), heads = q.size(1), tokens = q.size(2), dim = q.size(3);
  const auto options = in.q.options();
  Outputs to;
  // In memory (B, L, H, d): the linear projection after attention then needs no copy.
  to.out = at::empty({batch, tokens, heads, dim}, options).transpose(1, 2);
  if (table_v) to.sums = at::empty({batch, heads, tokens, in.grid.lookups()}, options);
  to.lse = at::empty({batch, heads, tokens}, options);
  at::parallel_for(0, in.slices(), 1, [&](int64_t from, int64_t until) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor tile = at::empty({in.block(), tokens}, options);
    const Lookups lookups(in, from, until);
    for_each_block(in, from, until, table_v || table_k, [&](const BlockBuckets& block, int64_t bh) {
      AT_DISPATCH_FLOATING_TYPES(in.q.scalar_type(), "attention_forward", [&] {
        forward_block<scalar_t>(tile.narrow(0, 0, block.rows), lookups, in, block, bh, to);
      });
    });
  });
  const auto narrow = q.scalar_type();
  return {to.out.to(narrow), to.sums ? to.sums->to(narrow) : at::empty({0}, q.options()), to.lse};
}

// Further inputs of the backward, and its outputs, in the dtype of computation.
struct Gradients {
  Tensor grad_out, out;
  OptionalTensor sums;
  Tensor lse;
  Tensor q, k, v;
  OptionalTensor table_k, table_q, table_v;  // (B, H, ...), summed at the end
};

// Working memory of one thread.
struct Tiles {
  Tensor weights, grad;  // logits, then weights; their gradient
  Tensor factors;        // factors of dropout for one row
  Tensor buckets;        // (rows, terms x K): gradients of the bucket sums, then of the lookups
  HeadScratch of_keys;   // gradients of the lookups of keys

  Tiles(const Inputs& in, int64_t from, int64_t until) {
    const auto options = in.q.options();
    weights = at::empty({in.block(), in.tokens()}, options);
    grad = at::empty_like(weights);
    if (in.dropout.p > 0) factors = at::empty({in.tokens()}, options);
    if (in.table_k || in.table_v) buckets = at::empty({in.block(), in.grid.lookups()}, options);
    if (in.table_q) of_keys = HeadScratch(in, from, until);
  }
};

// Replaces the gradients of the weights of a block by those of the logits, and multiplies the
// weights by the factors of dropout.
template <typename scalar_t>
void through_rows(const Tiles& tiles, const Inputs& in, const BlockBuckets& block, int64_t bh,
                  const Gradients& g) {
  const int64_t tokens = in.tokens(), dim = in.q.size(3), lookups = in.grid.lookups();
  scalar_t* weights = tiles.weights.mutable_data_ptr<scalar_t>();
  scalar_t* grads = tiles.grad.mutable_data_ptr<scalar_t>();
  scalar_t* factors = in.dropout.p > 0 ? tiles.factors.mutable_data_ptr<scalar_t>() : nullptr;
  const scalar_t *grad_out = in.data<scalar_t>(g.grad_out, bh), *out = in.data<scalar_t>(g.out, bh);
  const scalar_t* of_sums = in.table_v ? tiles.buckets.const_data_ptr<scalar_t>() : nullptr;
  for (int64_t r = 0; r < block.rows; ++r) {
    const int64_t i = block.begin + r;
    const scalar_t delta =
        dot(grad_out + i * g.grad_out.stride(2), out + i * g.out.stride(2), dim);
    for (int64_t t = 0; of_sums && t < block.terms; ++t) {
      add_gathered(grads + r * tokens, of_sums + r * lookups, block.query_row(r, t), tokens);
    }
    if (factors) in.dropout.fill(factors, tokens, i, bh);
    through_softmax(grads + r * tokens, weights + r * tokens, factors, delta, tokens);
  }
}

// Adds to the gradients of a table and of tokens `x`, from the gradient of the lookups of these
// tokens. With `first` the gradient of the table is overwritten.
inline void through_table(const Tensor& grad_lookups, const Table& table, const Tensor& grad_table,
                          const Tensor& x, Tensor grad_x, const Inputs& in, int64_t bh,
                          bool first) {
  if (table.is_bias()) {
    Tensor grad_values = grad_table[bh / in.heads()][bh % in.heads()];
    if (first) grad_values.zero_();
    grad_values.add_(grad_lookups.sum(0));
    return;
  }
  Tensor grad_values = in.slice(grad_table, bh);
  at::addmm_out(grad_x, grad_x, grad_lookups, in.slice(table, bh).t(), 1, in.scale);
  at::addmm_out(grad_values, grad_values, x.t(), grad_lookups, first ? 0 : 1, in.scale);
}

template <typename scalar_t>
void backward_block(const Tiles& tiles, const Lookups& lookups, const Inputs& in,
                    const BlockBuckets& block, int64_t bh, const Gradients& g) {
  const int64_t tokens = in.tokens(), rows = block.rows, width = in.grid.lookups();
  const bool first = block.begin == 0, last = block.begin + rows == tokens;
  const auto block_of = [&](const Tensor& x) { return in.rows(x, bh, block.begin, rows); };
  const scalar_t* lse = in.data<scalar_t>(g.lse, bh) + block.begin;
  const Tensor weights = tiles.weights.narrow(0, 0, rows);
  fill_logits<scalar_t>(weights, lookups, in, bh, block);
  scalar_t* row = weights.mutable_data_ptr<scalar_t>();
  for (int64_t r = 0; r < rows; ++r) exponentials(row + r * tokens, lse[r], tokens);

  const Tensor grad_out = block_of(g.grad_out);
  Tensor grad = tiles.grad.narrow(0, 0, rows), buckets;
  if (tiles.buckets.defined()) buckets = tiles.buckets.narrow(0, 0, rows);
  at::mm_out(grad, grad_out, in.slice(in.v, bh).t());
  if (in.table_v) at::mm_out(buckets, grad_out, in.slice(*in.table_v, bh).t());
  through_rows<scalar_t>(tiles, in, block, bh, g);

  // The gradients of keys, values and tables are sums over all blocks of queries: the first block
  // of a head writes them, the others add to them.
  const int64_t beta = first ? 0 : 1;
  Tensor grad_q = block_of(g.q), grad_k = in.slice(g.k, bh), grad_v = in.slice(g.v, bh);
  at::addmm_out(grad_q, grad_q, grad, in.slice(in.k, bh), 0, in.scale);
  at::addmm_out(grad_k, grad_k, grad.t(), block_of(in.q), beta, in.scale);
  at::addmm_out(grad_v, grad_v, weights.t(), grad_out, beta, 1);
  if (in.table_v) {
    Tensor grad_table = in.slice(*g.table_v, bh);
    at::addmm_out(grad_table, grad_table, block_of(*g.sums).t(), grad_out, beta, 1);
  }
  const scalar_t* pairs = grad.const_data_ptr<scalar_t>();
  if (in.table_k) {
    std::fill_n(buckets.mutable_data_ptr<scalar_t>(), rows * width, scalar_t(0));
    for (int64_t t = 0; t < block.terms; ++t) {
      add_to_buckets(buckets.mutable_data_ptr<scalar_t>(), width, pairs, tokens,
                     block.query_row(0, t), block.stride(), rows, tokens);
    }
    through_table(buckets, *in.table_k, *g.table_k, block_of(in.q), grad_q, in, bh, first);
  }
  if (!in.table_q) return;
  Tensor of_keys = tiles.of_keys.of(bh);
  if (first) std::fill_n(of_keys.mutable_data_ptr<scalar_t>(), tokens * width, scalar_t(0));
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t t = 0; t < block.terms; ++t) {
      add_to_buckets_of_keys(of_keys.mutable_data_ptr<scalar_t>(), width, pairs + r * tokens,
                             block.key_row(r, t), tokens);
    }
  }
  if (last) {
    through_table(of_keys, *in.table_q, *g.table_q, in.slice(in.k, bh), grad_k, in, bh, true);
  }
}

// Memory for the gradients of a table in every head of every image. They are summed at the end, so
// that the order of additions does not depend on the threads.
OptionalTensor empty_grad(const OptionalTable& table, const Inputs& in) {
  if (!table) return std::nullopt;
  std::vector<int64_t> sizes{in.q.size(0), in.heads()};
  for (int64_t n = 1; n < table->values.dim(); ++n) sizes.push_back(table->values.size(n));
  return at::empty(sizes, in.q.options());
}

// Sums the gradients of a table over images and, for a shared table, over heads.
OptionalTensor total_grad(const OptionalTensor& of_heads, const OptionalTable& table,
                          const Tensor& like) {
  if (!of_heads) return std::nullopt;
  const Tensor total = of_heads->sum(0);
  return (table->values.size(0) == 1 ? total.sum(0, true) : total).to(like.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, OptionalTensor, OptionalTensor, OptionalTensor>
attention_backward(
    const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v,
    const OptionalTensor& table_k, const OptionalTensor& table_q, const OptionalTensor& table_v,
    const Tensor& row_base, const Tensor& local, int64_t height, int64_t width, int64_t skip,
    int64_t num_buckets, const OptionalTensor& key_padding, const Tensor& seed, const Tensor& out,
    const Tensor& sums, const Tensor& lse, double scale, double dropout_p) {
  const Inputs in = make_inputs(q, k, v, table_k, table_q, table_v, row_base, local, height, width,
                                skip, num_buckets, key_padding, seed, scale, dropout_p);
  const auto wide = in.q.scalar_type();
  const auto options = in.q.options();
  check_tensor("grad_out", grad_out, q.sizes(), in.narrow, q.device());
  check_tensor("out", out, q.sizes(), in.narrow, q.device());
  check_tensor("lse", lse, q.sizes().slice(0, 3), wide, q.device());
  if (table_v) {
    const int64_t lookups = in.grid.lookups();
    check_tensor("sums", sums, {q.size(0), q.size(1), q.size(2), lookups}, in.narrow, q.device());
  }
  Gradients g;
  g.grad_out = widen(grad_out, wide);
  g.out = widen(out, wide);
  if (table_v) g.sums = sums.to(wide);
  g.lse = lse.contiguous();
  // In memory (B, L, H, d), as the linear projections before attention compute q, k and v.
  for (Tensor* grad : {&g.q, &g.k, &g.v}) {
    *grad = at::empty({q.size(0), q.size(2), q.size(1), q.size(3)}, options).transpose(1, 2);
  }
  g.table_k = empty_grad(in.table_k, in);
  g.table_q = empty_grad(in.table_q, in);
  g.table_v = empty_grad(in.table_v, in);
  at::parallel_for(0, in.slices(), 1, [&](int64_t from, int64_t until) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const Tiles tiles(in, from, until);
    const Lookups lookups(in, from, until);
    for_each_block(in, from, until, table_k || table_v, [&](const BlockBuckets& block, int64_t bh) {
      AT_DISPATCH_FLOATING_TYPES(wide, "attention_backward", [&] {
        backward_block<scalar_t>(tiles, lookups, in, block, bh, g);
      });
    });
  });
  const auto narrow = [&](const Tensor& x) { return x.to(q.scalar_type()); };
  return {narrow(g.q), narrow(g.k), narrow(g.v), total_grad(g.table_k, in.table_k, q),
          total_grad(g.table_q, in.table_q, q), total_grad(g.table_v, in.table_v, q)};
}

}  // namespace
}  // namespace rpe_ops

#define RPE_OPS_INPUTS                                                                       \
  "Tensor q, Tensor k, Tensor v, Tensor? table_k, Tensor? table_q, Tensor? table_v, "        \
  "Tensor row_base, Tensor local, int height, int width, int skip, int num_buckets, "        \
  "Tensor? key_padding, Tensor seed, "

TORCH_LIBRARY_FRAGMENT(rpe_ops_cpp, library) {
  library.def("attention_forward(" RPE_OPS_INPUTS
              "float scale, float dropout_p) -> (Tensor, Tensor, Tensor)");
  library.def("attention_backward(Tensor grad_out, " RPE_OPS_INPUTS
              "Tensor out, Tensor sums, Tensor lse, float scale, float dropout_p)"
              " -> (Tensor, Tensor, Tensor, Tensor?, Tensor?, Tensor?)");
}

TORCH_LIBRARY_IMPL(rpe_ops_cpp, CPU, library) {
  library.impl("attention_forward", rpe_ops::attention_forward);
  library.impl("attention_backward", rpe_ops::attention_backward);
}
