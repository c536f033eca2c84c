"""Reference implementation in plain torch; all other implementations are compared with it.

    gather:      out[b,h,i,j] = lookup[b,h,i, bucket_ids[i,j]]
    bucket sum:  out[b,h,i,n] = Σ_j [bucket_ids[i,j] = n] · pairs[b,h,i,j]
    attention:   logits[i,j] = scale·q_i·k_j + lookup_k[i, bucket(i,j)] + lookup_q[j, bucket(j,i)]
                 A = dropout(softmax(logits));  out = A v;  sums = the bucket sums of A

`rpe_ops.tables` adds the products with the tables. Runs on every device and holds whole L × L
tensors. On CUDA the bucket sum uses atomics, so its last bits differ from run to run.
Notation: rpe_ops/README.md.

Source: the efficient implementation described in iRPE (Wu et al., ICCV 2021).
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


def gather(lookup: Tensor, bucket_ids: Tensor) -> Tensor:
    """Read the value of every pair's bucket; see `rpe_ops.gather`."""
    ids = bucket_ids.long().expand(*lookup.shape[:-1], bucket_ids.shape[-1])
    return torch.gather(lookup, -1, ids)


def bucket_sum(pairs: Tensor, bucket_ids: Tensor, num_buckets: int) -> Tensor:
    """Sum the pairs of every bucket, in float32 or wider; see `rpe_ops.bucket_sum`."""
    accumulate_dtype = torch.promote_types(pairs.dtype, torch.float32)
    sums = pairs.new_zeros(*pairs.shape[:-1], num_buckets, dtype=accumulate_dtype)
    sums = sums.scatter_add(-1, bucket_ids.long().expand_as(pairs), pairs.to(accumulate_dtype))
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
    needs_sums: bool,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend with lookups, which hold one value per token and bucket.

    Args:
        q: Queries `(B, H, L, d)`.
        k: Keys, like `q`.
        v: Values, like `q`.
        lookup_k: `(B, H, L, terms·K)`; `lookup_k[i, bucket(i, j)]` is added to logit (i, j).
        lookup_q: `(B, H, L, terms·K)`; `lookup_q[j, bucket(j, i)]` is added to logit (i, j).
        buckets: Buckets of the grid.
        key_padding: `(B, L)` bool, True on keys that no query attends to.
        seed: Seed of dropout, one int64.
        needs_sums: Compute the bucket sums of the attention weights.
        scale: Factor on the products of queries and keys.
        dropout_p: Probability of dropping an attention weight, in [0, 1).

    Returns:
        `out (B, H, L, d)`, in the memory order `(B, L, H, d)`; `sums (B, H, L, terms·K)` or an
        empty tensor; and `lse (B, H, L)`, the logarithm of the sum of exponentials of every row of
        logits, float32 or wider, -inf for a query without any key.
    """
    logits, ids = _logits(q, k, lookup_k, lookup_q, buckets, key_padding, scale)
    lse = logits.logsumexp(-1)
    weights = _weights(logits, lse) * _survivors(seed, logits, dropout_p)
    out = _with_adjacent_heads((weights @ v.to(weights.dtype)).to(q.dtype))
    if not needs_sums:
        return out, q.new_empty(0), lse
    sums = weights.new_zeros(*weights.shape[:-1], buckets.num_lookups)
    for term_ids in ids:
        sums.scatter_add_(-1, term_ids.expand_as(weights), weights)
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
    """Compute the gradients of q, k, v, lookup_k and lookup_q; None for an absent input.

    `delta (B, H, L)`, in the dtype of `lse`, is one number per query: all outputs of the query,
    including its bucket sums, times their gradients, added up. For the other arguments see
    `lookup_forward`.
    """
    logits, ids = _logits(q, k, lookup_k, lookup_q, buckets, key_padding, scale)
    weights, survivors = _weights(logits, lse), _survivors(seed, logits, dropout_p)
    wide = weights.dtype
    q_wide, k_wide, v_wide, grad_out = (x.to(wide) for x in (q, k, v, grad_out))
    grad_weights = grad_out @ v_wide.transpose(-2, -1)
    if grad_sums is not None:
        grad_sums = grad_sums.to(wide)
        for term_ids in ids:
            grad_weights += grad_sums.gather(-1, term_ids.expand_as(weights))
    grad_v = (weights * survivors).transpose(-2, -1) @ grad_out
    grad_logits = weights * (grad_weights * survivors - delta[..., None])
    grad_q = scale * (grad_logits @ k_wide)
    grad_k = scale * (grad_logits.transpose(-2, -1) @ q_wide)
    grads = [_with_adjacent_heads(x.to(q.dtype)) for x in (grad_q, grad_k, grad_v)]
    sides = ((lookup_k, grad_logits), (lookup_q, grad_logits.transpose(-2, -1)))
    for lookup, pairs in sides:
        grad = None if lookup is None else pairs.new_zeros(lookup.shape)
        for term_ids in ids if grad is not None else ():
            grad.scatter_add_(-1, term_ids.expand_as(pairs), pairs)
        grads.append(None if grad is None else grad.to(q.dtype))
    return tuple(grads)


def _with_adjacent_heads(x: Tensor) -> Tensor:
    """Copy `(B, H, L, d)` to the memory order `(B, L, H, d)` of linear projections."""
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
    """Return logits in float32 or wider, -inf on padding, and the bucket ids of every term."""
    wide = torch.promote_types(q.dtype, torch.float32)
    logits = (q.to(wide) * scale) @ k.to(wide).transpose(-2, -1)
    ids = buckets.bucket_ids()
    for term_ids in ids:
        if lookup_k is not None:
            logits += lookup_k.to(wide).gather(-1, term_ids.expand_as(logits))
        if lookup_q is not None:
            logits += lookup_q.to(wide).gather(-1, term_ids.expand_as(logits)).transpose(-2, -1)
    if key_padding is not None:
        logits.masked_fill_(key_padding[:, None, None, :], float("-inf"))
    return logits, ids


def _weights(logits: Tensor, lse: Tensor) -> Tensor:
    """Return the softmax of the logits; zero for a query without any key."""
    lse = lse[..., None]
    return (logits - lse.masked_fill(torch.isneginf(lse), 0.0)).exp()


def _survivors(seed: Tensor, logits: Tensor, dropout_p: float) -> Tensor | float:
    """Return the factors of dropout, 0 or `1 / (1 - p)`."""
    if dropout_p == 0:
        return 1.0
    return keep_mask(seed, *logits.shape, dropout_p).to(logits.dtype) / (1 - dropout_p)


def attention_forward(q: Tensor, *rest) -> tuple[Tensor, Tensor, Tensor]:
    """Attend, in float32 or wider, and round once; see `rpe_ops.tables.attention_forward`."""
    out, sums, lse = tables.attention_forward(lookup_forward, *_widened(q, *rest))
    return out.to(q.dtype), sums.to(q.dtype), lse


def attention_backward(grad_out: Tensor, q: Tensor, *rest) -> tuple[Tensor | None, ...]:
    """Compute the gradients of attention; see `rpe_ops.tables.attention_backward`."""
    grads = tables.attention_backward(lookup_backward, *_widened(grad_out, q, *rest))
    return tuple(None if grad is None else grad.to(q.dtype) for grad in grads)


def _widened(*arguments) -> tuple:
    """Convert floating-point tensors to float32 or wider; leave other arguments unchanged."""
    return tuple(
        x.to(torch.promote_types(x.dtype, torch.float32))
        if isinstance(x, Tensor) and x.is_floating_point()
        else x
        for x in arguments
    )
