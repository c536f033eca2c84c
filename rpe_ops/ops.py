"""`torch.library` operators: schemas, fakes, autograd.

`rpe_ops::gather` and `rpe_ops::bucket_sum` are adjoint linear maps of their first argument, so
each one's backward is the other and derivatives of every order come for free. The implementation
is an argument, resolved before the call: the compiler sees one opaque, fake-able operator and no
hidden dispatch.
"""

import torch
from torch import Tensor

from rpe_ops import implementations

__all__ = ["gather", "bucket_sum"]

torch.library.define(
    "rpe_ops::gather", "(Tensor lookup, Tensor index, str implementation) -> Tensor"
)
torch.library.define(
    "rpe_ops::bucket_sum",
    "(Tensor pairs, Tensor index, SymInt num_buckets, str implementation) -> Tensor",
)


@torch.library.impl("rpe_ops::gather", "default")
def _gather(lookup: Tensor, index: Tensor, implementation: str) -> Tensor:
    return implementations.load(implementation)[0](lookup, index)


@torch.library.impl("rpe_ops::bucket_sum", "default")
def _bucket_sum(pairs: Tensor, index: Tensor, num_buckets: int, implementation: str) -> Tensor:
    return implementations.load(implementation)[1](pairs, index, num_buckets)


@torch.library.register_fake("rpe_ops::gather")
def _gather_fake(lookup: Tensor, index: Tensor, implementation: str) -> Tensor:
    return lookup.new_empty(*lookup.shape[:-1], index.shape[-1])


@torch.library.register_fake("rpe_ops::bucket_sum")
def _bucket_sum_fake(pairs: Tensor, index: Tensor, num_buckets: int, implementation: str) -> Tensor:
    return pairs.new_empty(*pairs.shape[:-1], num_buckets)


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


torch.library.register_autograd("rpe_ops::gather", _gather_backward, setup_context=_gather_setup)
torch.library.register_autograd(
    "rpe_ops::bucket_sum", _bucket_sum_backward, setup_context=_bucket_sum_setup
)

gather = torch.ops.rpe_ops.gather.default
bucket_sum = torch.ops.rpe_ops.bucket_sum.default
