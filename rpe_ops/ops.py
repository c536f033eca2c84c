"""`torch.library` operators: schemas, fakes, autograd.

`rpe_ops::gather` and `rpe_ops::bucket_sum` are adjoint linear maps of their first argument: each
one is the backward of the other, so derivatives of every order exist. The backward of
`rpe_ops::attention` is a separate operator, which has no derivative. The implementation is an
argument, chosen before the call, so that `torch.compile` sees one opaque operator without any
hidden dispatch. Notation: rpe_ops/README.md.
"""

import torch
from torch import Tensor

from rpe_ops import implementations
from rpe_ops.grid import GridBuckets

__all__ = ["gather", "bucket_sum", "attention", "attention_backward", "attend"]

_PLAIN = {Tensor, torch.nn.Parameter, type(None)}

torch.library.define(
    "rpe_ops::gather", "(Tensor lookup, Tensor bucket_ids, str implementation) -> Tensor"
)
torch.library.define(
    "rpe_ops::bucket_sum",
    "(Tensor pairs, Tensor bucket_ids, SymInt num_buckets, str implementation) -> Tensor",
)
_BUCKETS = (
    "Tensor row_base, Tensor local, SymInt height, SymInt width, SymInt skip, SymInt num_buckets, "
    "SymInt run_width"
)
_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? table_k, Tensor? table_q, Tensor? table_v, "
    f"{_BUCKETS}, Tensor? key_padding, Tensor seed"
)
torch.library.define(
    "rpe_ops::attention",
    f"({_INPUTS}, float scale, float dropout_p, str implementation)"
    " -> (Tensor out, Tensor sums, Tensor lse)",
)
torch.library.define(
    "rpe_ops::attention_backward",
    f"(Tensor grad_out, {_INPUTS}, Tensor out, Tensor sums, Tensor lse, "
    "float scale, float dropout_p, str implementation) -> (Tensor grad_q, Tensor grad_k, "
    "Tensor grad_v, Tensor grad_table_k, Tensor grad_table_q, Tensor grad_table_v)",
)


@torch.library.impl("rpe_ops::gather", "default")
def _gather(lookup: Tensor, bucket_ids: Tensor, implementation: str) -> Tensor:
    """Run `gather` of an implementation."""
    return implementations.load(implementation).gather(lookup, bucket_ids)


@torch.library.impl("rpe_ops::bucket_sum", "default")
def _bucket_sum(pairs: Tensor, bucket_ids: Tensor, num_buckets: int, implementation: str) -> Tensor:
    """Run `bucket_sum` of an implementation."""
    return implementations.load(implementation).bucket_sum(pairs, bucket_ids, num_buckets)


def _attention(*inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Run the forward pass of attention of an implementation."""
    return _run("attention_forward", *inputs[:6], GridBuckets(*inputs[6:13]), *inputs[13:])


def _attention_backward(*inputs) -> tuple[Tensor, ...]:
    """Run the backward pass of attention of an implementation."""
    grads = _run("attention_backward", *inputs[:7], GridBuckets(*inputs[7:14]), *inputs[14:])
    # A torch.library operator cannot return None, so an empty tensor means "no gradient".
    return tuple(inputs[0].new_empty(0) if grad is None else grad for grad in grads)


def _run(name: str, *arguments) -> tuple:
    """Call a function of the implementation that is the last argument."""
    *arguments, implementation = arguments
    function = getattr(implementations.load(implementation), name)
    device_type = arguments[0].device.type
    # The operator computes in the dtype of its inputs, so autocast must not change the dtype of the
    # torch operators inside. Entering a context costs more time than this question.
    if not torch.is_autocast_enabled(device_type):
        return function(*arguments)
    with torch.autocast(device_type, enabled=False):
        return function(*arguments)


torch.library.impl("rpe_ops::attention", "default", _attention)
torch.library.impl("rpe_ops::attention_backward", "default", _attention_backward)


@torch.library.register_fake("rpe_ops::gather")
def _gather_fake(lookup: Tensor, bucket_ids: Tensor, implementation: str) -> Tensor:
    """Return an empty result of `gather`, for tracing."""
    return lookup.new_empty(*lookup.shape[:-1], bucket_ids.shape[-1])


@torch.library.register_fake("rpe_ops::bucket_sum")
def _bucket_sum_fake(
    pairs: Tensor, bucket_ids: Tensor, num_buckets: int, implementation: str
) -> Tensor:
    """Return an empty result of `bucket_sum`, for tracing."""
    return pairs.new_empty(*pairs.shape[:-1], num_buckets)


@torch.library.register_fake("rpe_ops::attention")
def _attention_fake(q, k, v, table_k, table_q, table_v, *rest):
    """Return empty results of `attention`, for tracing."""
    wide = torch.promote_types(q.dtype, torch.float32)
    sums = (0,) if table_v is None else (*q.shape[:-1], table_v.shape[1])
    return _new_with_adjacent_heads(q), q.new_empty(sums), q.new_empty(q.shape[:-1], dtype=wide)


@torch.library.register_fake("rpe_ops::attention_backward")
def _attention_backward_fake(grad_out, q, k, v, table_k, table_q, table_v, *rest):
    """Return empty results of `attention_backward`, for tracing."""
    tables = [q.new_empty(0 if x is None else x.shape) for x in (table_k, table_q, table_v)]
    return (*(_new_with_adjacent_heads(x) for x in (q, k, v)), *tables)


def _new_with_adjacent_heads(q: Tensor) -> Tensor:
    """Return an empty `(B, H, L, d)` in the memory order `(B, L, H, d)` of linear projections."""
    return q.new_empty(*(q.shape[dim] for dim in (0, 2, 1, 3))).transpose(1, 2)


def _gather_setup(ctx, inputs, output) -> None:
    """Keep what the derivative of `gather` needs."""
    lookup, bucket_ids, ctx.implementation = inputs
    ctx.num_buckets = lookup.shape[-1]
    ctx.save_for_backward(bucket_ids)


def _gather_backward(ctx, grad: Tensor):
    """Return the gradient of `gather`: a bucket sum."""
    (bucket_ids,) = ctx.saved_tensors
    return bucket_sum(grad, bucket_ids, ctx.num_buckets, ctx.implementation), None, None


def _bucket_sum_setup(ctx, inputs, output) -> None:
    """Keep what the derivative of `bucket_sum` needs."""
    _, bucket_ids, _, ctx.implementation = inputs
    ctx.save_for_backward(bucket_ids)


def _bucket_sum_backward(ctx, grad: Tensor):
    """Return the gradient of `bucket_sum`: a gather."""
    (bucket_ids,) = ctx.saved_tensors
    return gather(grad, bucket_ids, ctx.implementation), None, None, None


def _attention_setup(ctx, inputs, output) -> None:
    """Keep what the derivative of `attention` needs."""
    *tensors, ctx.scale, ctx.dropout_p, ctx.implementation = inputs
    # The first eight inputs are tensors: q, k, v, three tables and two axis offsets. The five sizes
    # of the grid follow.
    ctx.grid = tensors[8:13]
    ctx.save_for_backward(*tensors[:8], *tensors[13:], *output)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _attention_grad(ctx, grad_out: Tensor | None, *_):
    """Return the gradients of `attention` for each of its 18 inputs."""
    if grad_out is None:
        return (None,) * 18
    saved = ctx.saved_tensors
    grads = attention_backward(
        grad_out, *saved[:8], *ctx.grid, *saved[8:], ctx.scale, ctx.dropout_p, ctx.implementation
    )
    return *_of_present(grads, saved), *[None] * 12


def _of_present(grads: tuple[Tensor, ...], inputs: tuple[Tensor | None, ...]) -> list:
    """Replace the empty gradients of absent tables by None; `inputs` begins with q, k, v."""
    pairs = zip(grads, inputs, strict=False)
    return [None if x is None else grad for grad, x in pairs]


def _no_second_derivative(ctx, *grads: Tensor | None):
    """Raise RuntimeError, because `attention_backward` has no derivative."""
    raise RuntimeError(
        "rpe_ops.attention has no second derivative: if you need one, choose an implementation "
        "of irpe_core.rpe_attention that is not fused, such as 'reference'"
    )


class _EagerAttention(torch.autograd.Function):
    """`rpe_ops::attention` and its derivative without the dispatcher, for eager execution.

    The autograd of `torch.library` runs in Python and costs more time on the host than a small
    attention on a GPU. The inputs are those of `attend`.
    """

    @staticmethod
    def forward(ctx, *inputs):
        """Compute attention."""
        out, sums, lse = _run("attention_forward", *inputs)
        ctx.buckets, ctx.rest = inputs[6], inputs[9:]
        ctx.save_for_backward(*inputs[:6], *inputs[7:9], out, sums, lse)
        return out

    @staticmethod
    def backward(ctx, grad_out):
        """Compute the gradients, like the operator."""
        saved = ctx.saved_tensors
        tensors, others = (grad_out, *saved[:6]), (*saved[6:], *ctx.rest)
        if torch.is_grad_enabled():
            # With create_graph, the operator raises the error about the second derivative.
            grads = _of_present(attention_backward(*tensors, *ctx.buckets, *others), saved)
        else:
            grads = _run("attention_backward", *tensors, ctx.buckets, *others)
        return *grads, *[None] * 6


def _is_eager(tensors: tuple) -> bool:
    """Return whether nothing but autograd has to see the operator.

    Tracers, dispatch modes (such as `FlopCounterMode`), function transforms and tensor subclasses
    work through the dispatcher.
    """
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and _PLAIN.issuperset(map(type, tensors))
    )


def attend(*inputs) -> Tensor:
    """Return `out` of `rpe_ops::attention`, on the path with the least cost on the host.

    The inputs are those of the operator, but the buckets are one argument, `GridBuckets`.
    """
    buckets = inputs[6]
    if not _is_eager((*inputs[:6], *buckets[:2])):
        return attention(*inputs[:6], *buckets, *inputs[7:])[0]
    if torch.is_grad_enabled():
        return _EagerAttention.apply(*inputs)
    return _run("attention_forward", *inputs)[0]


torch.library.register_autograd("rpe_ops::gather", _gather_backward, setup_context=_gather_setup)
torch.library.register_autograd(
    "rpe_ops::bucket_sum", _bucket_sum_backward, setup_context=_bucket_sum_setup
)
torch.library.register_autograd(
    "rpe_ops::attention", _attention_grad, setup_context=_attention_setup
)
torch.library.register_autograd("rpe_ops::attention_backward", _no_second_derivative)

gather = torch.ops.rpe_ops.gather.default
bucket_sum = torch.ops.rpe_ops.bucket_sum.default
attention = torch.ops.rpe_ops.attention.default
attention_backward = torch.ops.rpe_ops.attention_backward.default
