"""Reference implementation in plain torch, and the oracle of every other one.

    gather:      out[b,h,i,j] = lookup[b,h,i, index[i,j]]
    bucket sum:  out[b,h,i,n] = Σ_j [index[i,j] = n] · pairs[b,h,i,j]
    attention:   logits[i,j] = scale·q_i·k_j + lookup_k[i, bucket(i,j)] + lookup_q[j, bucket(j,i)]
                 A = dropout(softmax(logits));  out = A v;  sums = the bucket sums of A

and `rpe_ops.tables` for what attention does with its tables.

Source: the efficient implementation described in iRPE (Wu et al., ICCV 2021). Runs on every device,
and holds whole L × L tensors. On CUDA the bucket sum uses atomics, so its last bits differ from run
to run.
"""

import torch
from torch import Tensor

from rpe_ops import tables
from rpe_ops.dropout import keep_mask
from rpe_ops.grid import GridBuckets

__all__ = [
    "gather",
    "bucket_sum",
    "attention_forward",
    "attention_backward",
    "lookup_forward",
    "lookup_backward",
]


def gather(lookup: Tensor, index: Tensor) -> Tensor:
    """Spread per-bucket values over the pairs; see `rpe_ops.gather`."""
    index = index.long().expand(*lookup.shape[:-1], index.shape[-1])
    return torch.gather(lookup, -1, index)


def bucket_sum(pairs: Tensor, index: Tensor, num_buckets: int) -> Tensor:
    """Sum the pairs of every bucket, low precision in float32; see `rpe_ops.bucket_sum`."""
    accumulate_dtype = torch.promote_types(pairs.dtype, torch.float32)
    sums = pairs.new_zeros(*pairs.shape[:-1], num_buckets, dtype=accumulate_dtype)
    sums = sums.scatter_add(-1, index.long().expand_as(pairs), pairs.to(accumulate_dtype))
    return sums.to(pairs.dtype)


def lookup_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lookup_k: Tensor | None,
    lookup_q: Tensor | None,
    buckets: GridBuckets,
    key_padding: Tensor | None,
    seed: Tensor,
    want_sums: bool,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend with a value per token and bucket.

    Args:
        q: Queries `(B, H, L, d)`; keys `k` and values `v` alike.
        lookup_k: `(B, H, L, T·K)`, added to the logits of query i at bucket(i, j).
        lookup_q: `(B, H, L, T·K)`, added to the logits of key j at bucket(j, i).
        want_sums: Make the bucket sums of the weights.

    Returns:
        `out (B, H, L, d)`, in memory `(B, L, H, d)`, `sums (B, H, L, T·K)` or an empty tensor, and
        the logarithm `(B, H, L)` of every row's sum of exponentials, float32 or wider, -inf where
        it attends nowhere.
    """
    logits, index = _logits(q, k, lookup_k, lookup_q, buckets, key_padding, scale)
    lse = logits.logsumexp(-1)
    weights = _weights(logits, lse) * _survivors(seed, logits, dropout_p)
    out = _beside((weights @ v.to(weights.dtype)).to(q.dtype))
    if not want_sums:
        return out, q.new_empty(0), lse
    sums = weights.new_zeros(*weights.shape[:-1], buckets.num_lookups)
    for term in index:
        sums.scatter_add_(-1, term.expand_as(weights), weights)
    return out, sums.to(q.dtype), lse


def lookup_backward(
    grad_out: Tensor,
    grad_sums: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lookup_k: Tensor | None,
    lookup_q: Tensor | None,
    buckets: GridBuckets,
    key_padding: Tensor | None,
    seed: Tensor,
    delta: Tensor,
    lse: Tensor,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of q, k, v, lookup_k and lookup_q; None where there is no such input.

    `delta (B, H, L)` is, of every query, the sum of all its outputs, sums included, times their
    gradients, in the dtype of `lse`.
    """
    logits, index = _logits(q, k, lookup_k, lookup_q, buckets, key_padding, scale)
    weights, survivors = _weights(logits, lse), _survivors(seed, logits, dropout_p)
    wide = weights.dtype
    q_wide, k_wide, v_wide, grad_out = (x.to(wide) for x in (q, k, v, grad_out))
    grad_weights = grad_out @ v_wide.transpose(-2, -1)
    if grad_sums is not None:
        grad_sums = grad_sums.to(wide)
        for term in index:
            grad_weights += grad_sums.gather(-1, term.expand_as(weights))
    grad_v = (weights * survivors).transpose(-2, -1) @ grad_out
    grad_logits = weights * (grad_weights * survivors - delta[..., None])
    grad_q = scale * (grad_logits @ k_wide)
    grad_k = scale * (grad_logits.transpose(-2, -1) @ q_wide)
    grads = [_beside(x.to(q.dtype)) for x in (grad_q, grad_k, grad_v)]
    sides = ((lookup_k, grad_logits), (lookup_q, grad_logits.transpose(-2, -1)))
    for lookup, pairs in sides:
        grad = None if lookup is None else pairs.new_zeros(lookup.shape)
        for term in index if grad is not None else ():
            grad.scatter_add_(-1, term.expand_as(pairs), pairs)
        grads.append(None if grad is None else grad.to(q.dtype))
    return tuple(grads)


def _beside(x: Tensor) -> Tensor:
    """`(B, H, L, d)` with heads beside each other in memory, as the projections want them."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _logits(
    q: Tensor,
    k: Tensor,
    lookup_k: Tensor | None,
    lookup_q: Tensor | None,
    buckets: GridBuckets,
    key_padding: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Logits in float32 or wider with -inf on padding, and the buckets of every term."""
    wide = torch.promote_types(q.dtype, torch.float32)
    logits = (q.to(wide) * scale) @ k.to(wide).transpose(-2, -1)
    index = buckets.bucket_ids()
    for term in index:
        if lookup_k is not None:
            logits += lookup_k.to(wide).gather(-1, term.expand_as(logits))
        if lookup_q is not None:
            logits += lookup_q.to(wide).gather(-1, term.expand_as(logits)).transpose(-2, -1)
    if key_padding is not None:
        logits.masked_fill_(key_padding[:, None, None, :], float("-inf"))
    return logits, index


def _weights(logits: Tensor, lse: Tensor) -> Tensor:
    """The softmax; rows that attend nowhere are zero."""
    lse = lse[..., None]
    return (logits - lse.masked_fill(torch.isneginf(lse), 0.0)).exp()


def _survivors(seed: Tensor, logits: Tensor, dropout_p: float) -> Tensor | float:
    """What dropout multiplies the weights with."""
    if dropout_p == 0:
        return 1.0
    return keep_mask(seed, *logits.shape, dropout_p).to(logits.dtype) / (1 - dropout_p)


def attention_forward(q: Tensor, *rest) -> tuple[Tensor, Tensor, Tensor]:
    """Attend; see `rpe_ops.tables.attention_forward`. Computed wide, and rounded once."""
    out, sums, lse = tables.attention_forward(lookup_forward, *_widened(q, *rest))
    return out.to(q.dtype), sums.to(q.dtype), lse


def attention_backward(grad_out: Tensor, q: Tensor, *rest) -> tuple[Tensor | None, ...]:
    """Gradients of attention; see `rpe_ops.tables.attention_backward`."""
    grads = tables.attention_backward(lookup_backward, *_widened(grad_out, q, *rest))
    return tuple(None if grad is None else grad.to(q.dtype) for grad in grads)


def _widened(*arguments) -> tuple:
    """Floating-point tensors in float32 or wider; all else as it is."""
    return tuple(
        x.to(torch.promote_types(x.dtype, torch.float32))
        if isinstance(x, Tensor) and x.is_floating_point()
        else x
        for x in arguments
    )
