// Fused attention with encodings on the CPU; the mathematics are those of rpe_ops/reference.py.
//
// A tile holds the logits of some query rows of one head and stays in the cache, so nothing of size
// L x L is ever held. Matrix products are torch's own. The backward computes the weights anew from
// the logarithm of the row sums; a head belongs to one thread, since its rows add up to the
// gradients of keys and values: no atomics, the same bits in every run.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <tuple>

#include "attention_inputs.h"

namespace rpe_ops {
namespace {

// Calls body(index, bh) for every block of queries and every head.
template <typename Body>
void for_each_block(const Inputs& in, int64_t from, int64_t to, bool index_queries,
                    const Body& body) {
  for (int64_t begin = 0; begin < in.tokens(); begin += in.block()) {
    const BlockIndex index(in, begin, std::min(in.block(), in.tokens() - begin), index_queries);
    for (int64_t bh = from; bh < to; ++bh) body(index, bh);
  }
}

struct Outputs {
  Tensor out;           // (B, H, L, d)
  OptionalTensor sums;  // (B, H, L, terms x K)
  Tensor lse;           // (B, H, L)
};

template <typename scalar_t>
void forward_block(const Tensor& tile, const Inputs& in, const BlockIndex& index, int64_t bh,
                   const Outputs& to) {
  const int64_t tokens = in.tokens(), rows = index.rows;
  const auto block_of = [&](const Tensor& x) {
    return in.slice(x, bh).narrow(0, index.begin, rows);
  };
  scalar_t* lse = in.data<scalar_t>(to.lse, bh) + index.begin;
  fill_exponentials<scalar_t>(tile, in, bh, index, [&](int64_t r, const scalar_t* logits) {
    return lse[r] = largest(logits, tokens);
  });
  const Tensor total = tile.sum(1, true);
  block_of(to.lse).add_(total.squeeze(1).log());
  Tensor share = total.reciprocal();
  if (in.padding) share.masked_fill_(total.eq(0), 0);
  scalar_t* weights = tile.mutable_data_ptr<scalar_t>();
  if (in.dropout.p > 0) {
    std::vector<scalar_t> factors(tokens);
    for (int64_t r = 0; r < rows; ++r) {
      in.dropout.fill(factors.data(), tokens, index.begin + r, bh);
      for (int64_t j = 0; j < tokens; ++j) weights[r * tokens + j] *= factors[j];
    }
  }
  Tensor out = block_of(to.out);
  at::mm_out(out, tile, in.slice(in.v, bh));
  out.mul_(share);
  if (!to.sums) return;
  Tensor sums = block_of(*to.sums).zero_();
  for (int64_t t = 0; t < index.terms; ++t) {
    add_to_buckets(sums.mutable_data_ptr<scalar_t>(), in.grid.lookups(), weights, tokens,
                   index.query_row(0, t), index.stride(), rows, tokens);
  }
  sums.mul_(share);
}

std::tuple<Tensor, Tensor, Tensor> attention_forward(
    const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& lookup_k,
    const OptionalTensor& lookup_q, const Tensor& row_base, const Tensor& local, int64_t height,
    int64_t width, int64_t skip, int64_t num_buckets, const OptionalTensor& key_padding,
    const Tensor& seed, bool want_sums, double scale, double dropout_p) {
  const Inputs in = make_inputs(q, k, v, lookup_k, lookup_q, row_base, local, height, width, skip,
                                num_buckets, key_padding, seed, scale, dropout_p);
  const int64_t batch = q.size(0), heads = q.size(1), tokens = q.size(2), dim = q.size(3);
  const auto options = in.q.options();
  Outputs to;
  // Heads beside each other: what follows attention joins them without a copy.
  to.out = at::empty({batch, tokens, heads, dim}, options).transpose(1, 2);
  if (want_sums) to.sums = at::empty({batch, heads, tokens, in.grid.lookups()}, options);
  to.lse = at::empty({batch, heads, tokens}, options);
  at::parallel_for(0, in.slices(), 1, [&](int64_t from, int64_t until) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor tile = at::empty({in.block(), tokens}, options);
    for_each_block(in, from, until, want_sums || lookup_k, [&](const BlockIndex& index, int64_t bh) {
      AT_DISPATCH_FLOATING_TYPES(in.q.scalar_type(), "attention_forward", [&] {
        forward_block<scalar_t>(tile.narrow(0, 0, index.rows), in, index, bh, to);
      });
    });
  });
  const auto narrow = q.scalar_type();
  return {to.out.to(narrow), to.sums ? to.sums->to(narrow) : at::empty({0}, q.options()), to.lse};
}

// What the backward reads beside the inputs, and what it writes, in the dtype of computation.
struct Gradients {
  Tensor grad_out, out;
  OptionalTensor grad_sums, sums;
  Tensor lse;
  Tensor q, k, v;
  OptionalTensor lookup_k, lookup_q;
};

// Scratch of one thread: logits, then weights; their gradient; factors of dropout.
struct Tiles {
  Tensor weights, grad, factors;
};

// The gradient of the logits of a block from that of the weights, in place.
template <typename scalar_t>
void through_rows(const Tiles& tiles, const Inputs& in, const BlockIndex& index, int64_t bh,
                  const Gradients& g) {
  const int64_t tokens = in.tokens(), dim = in.q.size(3), lookups = in.grid.lookups();
  scalar_t* weights = tiles.weights.mutable_data_ptr<scalar_t>();
  scalar_t* grads = tiles.grad.mutable_data_ptr<scalar_t>();
  scalar_t* factors = in.dropout.p > 0 ? tiles.factors.mutable_data_ptr<scalar_t>() : nullptr;
  const scalar_t *grad_out = in.data<scalar_t>(g.grad_out, bh), *out = in.data<scalar_t>(g.out, bh);
  const scalar_t* grad_sums = in.data<scalar_t>(g.grad_sums, bh);
  const scalar_t* sums = in.data<scalar_t>(g.sums, bh);
  for (int64_t r = 0; r < index.rows; ++r) {
    const int64_t i = index.begin + r;
    scalar_t delta = dot(grad_out + i * g.grad_out.stride(2), out + i * g.out.stride(2), dim);
    if (grad_sums) {
      const scalar_t* row = grad_sums + i * g.grad_sums->stride(2);
      for (int64_t t = 0; t < index.terms; ++t) {
        add_gathered(grads + r * tokens, row, index.query_row(r, t), tokens);
      }
      delta += dot(row, sums + i * g.sums->stride(2), lookups);
    }
    if (factors) in.dropout.fill(factors, tokens, i, bh);
    through_softmax(grads + r * tokens, weights + r * tokens, factors, delta, tokens);
  }
}

template <typename scalar_t>
void backward_block(const Tiles& tiles, const Inputs& in, const BlockIndex& index, int64_t bh,
                    const Gradients& g) {
  const int64_t tokens = in.tokens(), rows = index.rows, lookups = in.grid.lookups();
  const auto block_of = [&](const Tensor& x) {
    return in.slice(x, bh).narrow(0, index.begin, rows);
  };
  const scalar_t* lse = in.data<scalar_t>(g.lse, bh) + index.begin;
  fill_exponentials<scalar_t>(tiles.weights, in, bh, index,
                              [&](int64_t r, const scalar_t*) { return lse[r]; });

  const Tensor grad_out = block_of(g.grad_out);
  Tensor grad = tiles.grad;
  at::mm_out(grad, grad_out, in.slice(in.v, bh).t());
  through_rows<scalar_t>(tiles, in, index, bh, g);

  // The first block of a head writes the gradients of keys and values, the others add to them.
  const int64_t beta = index.begin > 0 ? 1 : 0;
  Tensor grad_q = block_of(g.q), grad_k = in.slice(g.k, bh), grad_v = in.slice(g.v, bh);
  at::addmm_out(grad_q, grad_q, grad, in.slice(in.k, bh), 0, in.scale);
  at::addmm_out(grad_k, grad_k, grad.t(), block_of(in.q), beta, in.scale);
  at::addmm_out(grad_v, grad_v, tiles.weights.t(), grad_out, beta, 1);
  const scalar_t* pairs = grad.const_data_ptr<scalar_t>();
  scalar_t* sums_k = in.data<scalar_t>(g.lookup_k, bh);
  scalar_t* sums_q = in.data<scalar_t>(g.lookup_q, bh);
  for (int64_t t = 0; t < index.terms; ++t) {
    if (sums_k) {
      add_to_buckets(sums_k + index.begin * lookups, lookups, pairs, tokens, index.query_row(0, t),
                     index.stride(), rows, tokens);
    }
    for (int64_t r = 0; sums_q && r < rows; ++r) {
      add_to_buckets_of_keys(sums_q, lookups, pairs + r * tokens, index.key_row(r, t), tokens);
    }
  }
}

std::tuple<Tensor, Tensor, Tensor, OptionalTensor, OptionalTensor> attention_backward(
    const Tensor& grad_out, const OptionalTensor& grad_sums, const Tensor& q, const Tensor& k,
    const Tensor& v, const OptionalTensor& lookup_k, const OptionalTensor& lookup_q,
    const Tensor& row_base, const Tensor& local, int64_t height, int64_t width, int64_t skip,
    int64_t num_buckets, const OptionalTensor& key_padding, const Tensor& seed, const Tensor& out,
    const Tensor& sums, const Tensor& lse, double scale, double dropout_p) {
  const Inputs in = make_inputs(q, k, v, lookup_k, lookup_q, row_base, local, height, width, skip,
                                num_buckets, key_padding, seed, scale, dropout_p);
  const auto wide = in.q.scalar_type();
  const auto options = in.q.options();
  Gradients g;
  g.grad_out = *widen(grad_out, wide);
  g.out = *widen(out, wide);
  g.grad_sums = widen(grad_sums, wide);
  if (grad_sums) g.sums = widen(sums, wide);
  g.lse = lse.contiguous();
  for (Tensor* grad : {&g.q, &g.k, &g.v}) *grad = at::empty(q.sizes(), options);
  if (lookup_k) g.lookup_k = at::zeros(lookup_k->sizes(), options);
  if (lookup_q) g.lookup_q = at::zeros(lookup_q->sizes(), options);
  at::parallel_for(0, in.slices(), 1, [&](int64_t from, int64_t until) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const auto tile = [&] { return at::empty({in.block(), in.tokens()}, options); };
    const Tiles tiles{tile(), tile(), dropout_p > 0 ? at::empty({in.tokens()}, options) : Tensor()};
    for_each_block(in, from, until, lookup_k || grad_sums, [&](const BlockIndex& index, int64_t bh) {
      const Tiles part{tiles.weights.narrow(0, 0, index.rows), tiles.grad.narrow(0, 0, index.rows),
                       tiles.factors};
      AT_DISPATCH_FLOATING_TYPES(wide, "attention_backward",
                                 [&] { backward_block<scalar_t>(part, in, index, bh, g); });
    });
  });
  const auto narrow = [&](const Tensor& x) { return x.to(q.scalar_type()); };
  const auto maybe = [&](const OptionalTensor& x) { return x ? OptionalTensor(narrow(*x)) : x; };
  return {narrow(g.q), narrow(g.k), narrow(g.v), maybe(g.lookup_k), maybe(g.lookup_q)};
}

}  // namespace
}  // namespace rpe_ops

#define RPE_OPS_INPUTS                                                                    \
  "Tensor q, Tensor k, Tensor v, Tensor? lookup_k, Tensor? lookup_q, Tensor row_base, "   \
  "Tensor local, int height, int width, int skip, int num_buckets, Tensor? key_padding, " \
  "Tensor seed, "

TORCH_LIBRARY_FRAGMENT(rpe_ops_cpp, library) {
  library.def("attention_forward(" RPE_OPS_INPUTS
              "bool want_sums, float scale, float dropout_p) -> (Tensor, Tensor, Tensor)");
  library.def("attention_backward(Tensor grad_out, Tensor? grad_sums, " RPE_OPS_INPUTS
              "Tensor out, Tensor sums, Tensor lse, float scale, float dropout_p)"
              " -> (Tensor, Tensor, Tensor, Tensor?, Tensor?)");
}

TORCH_LIBRARY_IMPL(rpe_ops_cpp, CPU, library) {
  library.impl("attention_forward", rpe_ops::attention_forward);
  library.impl("attention_backward", rpe_ops::attention_backward);
}
