"""`torch.library` operators: schemas, fakes, autograd.

`rpe_ops::gather` and `rpe_ops::bucket_sum` are adjoint linear maps of their first argument, so
each one's backward is the other and derivatives of every order come for free. The backward of
`rpe_ops::attention` is an operator of its own, which has no derivative. The implementation is an
argument, resolved before the call: the compiler sees one opaque, fake-able operator and no hidden
dispatch.
"""

import torch
from torch import Tensor

from rpe_ops import implementations
from rpe_ops.grid import GridBuckets

__all__ = ["gather", "bucket_sum", "attention"]

torch.library.define(
    "rpe_ops::gather", "(Tensor lookup, Tensor index, str implementation) -> Tensor"
)
torch.library.define(
    "rpe_ops::bucket_sum",
    "(Tensor pairs, Tensor index, SymInt num_buckets, str implementation) -> Tensor",
)
_BUCKETS = (
    "Tensor row_base, Tensor local, SymInt height, SymInt width, SymInt skip, SymInt num_buckets, "
    "SymInt run_width"
)
_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? lookup_k, Tensor? lookup_q, "
    f"{_BUCKETS}, Tensor? key_padding, Tensor seed"
)
torch.library.define(
    "rpe_ops::attention",
    f"({_INPUTS}, bool want_sums, float scale, float dropout_p, str implementation)"
    " -> (Tensor out, Tensor sums, Tensor lse)",
)
torch.library.define(
    "rpe_ops::attention_backward",
    f"(Tensor grad_out, Tensor? grad_sums, {_INPUTS}, Tensor out, Tensor sums, Tensor lse, "
    "float scale, float dropout_p, str implementation)"
    " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_lookup_k, Tensor grad_lookup_q)",
)


@torch.library.impl("rpe_ops::gather", "default")
def _gather(lookup: Tensor, index: Tensor, implementation: str) -> Tensor:
    return implementations.load(implementation).gather(lookup, index)


@torch.library.impl("rpe_ops::bucket_sum", "default")
def _bucket_sum(pairs: Tensor, index: Tensor, num_buckets: int, implementation: str) -> Tensor:
    return implementations.load(implementation).bucket_sum(pairs, index, num_buckets)


@torch.library.impl("rpe_ops::attention", "default")
def _attention(
    q, k, v, lookup_k, lookup_q, *rest_and_implementation
) -> tuple[Tensor, Tensor, Tensor]:
    *rest, implementation = rest_and_implementation
    buckets, rest = GridBuckets(*rest[:7]), rest[7:]
    forward = implementations.load(implementation).attention_forward
    return forward(q, k, v, lookup_k, lookup_q, buckets, *rest)


@torch.library.impl("rpe_ops::attention_backward", "default")
def _attention_backward(grad_out, grad_sums, q, k, v, lookup_k, lookup_q, *rest_and_implementation):
    *rest, implementation = rest_and_implementation
    buckets, rest = GridBuckets(*rest[:7]), rest[7:]
    backward = implementations.load(implementation).attention_backward
    grads = backward(grad_out, grad_sums, q, k, v, lookup_k, lookup_q, buckets, *rest)
    # An operator returns tensors alone: an empty one stands for no gradient.
    return tuple(q.new_empty(0) if grad is None else grad for grad in grads)


@torch.library.register_fake("rpe_ops::gather")
def _gather_fake(lookup: Tensor, index: Tensor, implementation: str) -> Tensor:
    return lookup.new_empty(*lookup.shape[:-1], index.shape[-1])


@torch.library.register_fake("rpe_ops::bucket_sum")
def _bucket_sum_fake(pairs: Tensor, index: Tensor, num_buckets: int, implementation: str) -> Tensor:
    return pairs.new_empty(*pairs.shape[:-1], num_buckets)


@torch.library.register_fake("rpe_ops::attention")
def _attention_fake(q, k, v, lookup_k, lookup_q, row_base, *rest):
    num_buckets, want_sums = rest[4], rest[8]
    wide = torch.promote_types(q.dtype, torch.float32)
    sums = (*q.shape[:-1], row_base.shape[0] * num_buckets) if want_sums else (0,)
    out = q.new_empty(*(q.shape[dim] for dim in (0, 2, 1, 3))).transpose(1, 2)
    return out, q.new_empty(sums), q.new_empty(q.shape[:-1], dtype=wide)


@torch.library.register_fake("rpe_ops::attention_backward")
def _attention_backward_fake(grad_out, grad_sums, q, k, v, lookup_k, lookup_q, *rest):
    grads = [q.new_empty(x.shape) for x in (q, k, v)]
    lookups = [q.new_empty(0 if x is None else x.shape) for x in (lookup_k, lookup_q)]
    return (*grads, *lookups)


def _gather_setup(ctx, inputs, output) -> None:
    lookup, index, ctx.implementation = inputs
    ctx.num_buckets = lookup.shape[-1]
    ctx.save_for_backward(index)


def _gather_backward(ctx, grad: Tensor):
    (index,) = ctx.saved_tensors
    return bucket_sum(grad, index, ctx.num_buckets, ctx.implementation), None, None


def _bucket_sum_setup(ctx, inputs, output) -> None:
    _, index, _, ctx.implementation = inputs
    ctx.save_for_backward(index)


def _bucket_sum_backward(ctx, grad: Tensor):
    (index,) = ctx.saved_tensors
    return gather(grad, index, ctx.implementation), None, None, None


def _attention_setup(ctx, inputs, output) -> None:
    q, k, v, lookup_k, lookup_q, row_base, local, *rest = inputs
    *ctx.grid, key_padding, seed, ctx.want_sums, ctx.scale, ctx.dropout_p, ctx.impl = rest
    ctx.has_lookups = lookup_k is not None, lookup_q is not None
    ctx.save_for_backward(q, k, v, lookup_k, lookup_q, row_base, local, key_padding, seed, *output)
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _attention_grad(ctx, grad_out: Tensor | None, grad_sums: Tensor | None, _):
    q, k, v, lookup_k, lookup_q, row_base, local, key_padding, seed, *saved = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(saved[0])
    grads = attention_backward(
        grad_out,
        grad_sums if ctx.want_sums else None,
        *(q, k, v, lookup_k, lookup_q, row_base, local, *ctx.grid, key_padding, seed, *saved),
        *(ctx.scale, ctx.dropout_p, ctx.impl),
    )
    lookups = [grad if has else None for grad, has in zip(grads[3:], ctx.has_lookups, strict=True)]
    return (*grads[:3], *lookups, *[None] * 13)


torch.library.register_autograd("rpe_ops::gather", _gather_backward, setup_context=_gather_setup)
torch.library.register_autograd(
    "rpe_ops::bucket_sum", _bucket_sum_backward, setup_context=_bucket_sum_setup
)
torch.library.register_autograd(
    "rpe_ops::attention", _attention_grad, setup_context=_attention_setup
)

gather = torch.ops.rpe_ops.gather.default
bucket_sum = torch.ops.rpe_ops.bucket_sum.default
attention = torch.ops.rpe_ops.attention.default
attention_backward = torch.ops.rpe_ops.attention_backward.default
