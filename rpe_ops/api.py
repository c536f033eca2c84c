"""Public operators: validate, choose an implementation, call it."""

import torch
from torch import Tensor

from rpe_ops import implementations, ops, validation
from rpe_ops.grid import GridBuckets

__all__ = ["gather", "bucket_sum", "attention"]


def gather(
    lookup: Tensor, index: Tensor, *, implementation: str = "auto", check_bounds: bool = True
) -> Tensor:
    """Spread per-bucket values over the pairs: `out[..., i, j] = lookup[..., i, index[i, j]]`.

    Differentiable in `lookup` to any order; the backward is `bucket_sum`.

    Args:
        lookup: `(..., L_q, K)` floating point, one value per query and bucket; any strides.
        index: `(L_q, L_k)` int32 or int64, the bucket of every pair.
        implementation: `"auto"` or a name in `rpe_ops.IMPLEMENTATIONS`.
        check_bounds: Check that buckets lie in `[0, K)`, which waits for a GPU. Switch off only
            for an index that is right by construction. Not done inside `torch.compile`.

    Returns:
        `(..., L_q, L_k)` in the dtype of `lookup`.

    Raises:
        ValueError: A wrong shape, dtype, device or implementation name.
        IndexError: A bucket out of range.
        ImplementationError: An explicit implementation that cannot run here.
    """
    validation.check_floating("lookup", lookup)
    validation.check_pair_index(index, lookup.shape[-2], lookup.device)
    if check_bounds and not torch.compiler.is_compiling():
        validation.check_bounds(index, lookup.shape[-1])
    return ops.gather(lookup, index, implementations.resolve(implementation, lookup.device))


def bucket_sum(
    pairs: Tensor,
    index: Tensor,
    num_buckets: int,
    *,
    implementation: str = "auto",
    check_bounds: bool = True,
) -> Tensor:
    """Sum the pairs of every bucket: `out[..., i, n] = Σ_j [index[i, j] = n] · pairs[..., i, j]`.

    Differentiable in `pairs` to any order; the backward is `gather`. float16 and bfloat16 are
    accumulated in float32.

    Args:
        pairs: `(..., L_q, L_k)` floating point, one value per query and key; any strides.
        index: `(L_q, L_k)` int32 or int64, the bucket of every pair.
        num_buckets: `K`, at least 1.
        implementation: `"auto"` or a name in `rpe_ops.IMPLEMENTATIONS`.
        check_bounds: As in `gather`.

    Returns:
        `(..., L_q, K)` in the dtype of `pairs`.

    Raises:
        ValueError: A wrong shape, dtype, device, number of buckets or implementation name.
        IndexError: A bucket out of range.
        ImplementationError: An explicit implementation that cannot run here.
    """
    validation.check_floating("pairs", pairs)
    validation.check_pair_index(index, pairs.shape[-2], pairs.device)
    if index.shape[-1] != pairs.shape[-1]:
        raise ValueError(
            f"index has {index.shape[-1]} keys, pairs has {pairs.shape[-1]}: they must be equal"
        )
    if num_buckets < 1:
        raise ValueError(f"num_buckets must be at least 1, got {num_buckets}")
    if check_bounds and not torch.compiler.is_compiling():
        validation.check_bounds(index, num_buckets)
    chosen = implementations.resolve(implementation, pairs.device, "bucket_sum")
    return ops.bucket_sum(pairs, index, num_buckets, chosen)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    buckets: GridBuckets,
    *,
    lookup_k: Tensor | None = None,
    lookup_q: Tensor | None = None,
    want_sums: bool = False,
    key_padding: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Attend with encodings of the logits, and sum the attention weights of every bucket.

        logits[i, j] = scale·q_i·k_j + lookup_k[i, bucket(i, j)] + lookup_q[j, bucket(j, i)]
        A = dropout(softmax(logits));  out = A v;  sums[i, n] = Σ_j [bucket(i, j) = n] A[i, j]

    with all terms of the buckets, whose lookups are added. Nothing of size L × L is held, forward
    or backward, but by the implementation "reference". Differentiable once in `q`, `k`, `v` and the
    lookups; float16 and bfloat16 are accumulated in float32. The mask of dropout is drawn from
    torch's generator and is the same in the backward.

    Args:
        q: Queries `(B, H, L, d)`, float16, bfloat16, float32 (float64 on the CPU); any strides.
        k: Keys, like `q`.
        v: Values, like `q`.
        buckets: The grid's buckets, on the same device, `L` tokens in all.
        lookup_k: `(B, H, L, T·K)` or expandable to it, a value per query and bucket, in the dtype
            of `q`; for a contextual encoding `scale·(q @ table)`.
        lookup_q: The same per key.
        want_sums: Return the sums.
        key_padding: `(B, L)` bool, True on keys that nothing attends to. A query left without any
            key yields zeros.
        dropout_p: Probability of dropping an attention weight, in [0, 1).
        scale: Factor on the products, not 0, default `d**-0.5`.
        implementation: `"auto"` or a name in `rpe_ops.IMPLEMENTATIONS`.

    Returns:
        `out (B, H, L, d)`, and `sums (B, H, L, T·K)` or None, in the dtype of `q`.

    Raises:
        ValueError: A wrong shape, dtype, device, probability or implementation name.
        ImplementationError: An explicit implementation that cannot run here.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    validation.check_attention(q, k, v, buckets, lookup_k, lookup_q, key_padding, dropout_p, scale)
    chosen = implementations.resolve(implementation, q.device, "attention")
    if reason := implementations.reason_against_input(chosen, q):
        raise ValueError(reason)
    lookup_k, lookup_q = (
        None if lookup is None else lookup.expand(*q.shape[:-1], buckets.num_lookups)
        for lookup in (lookup_k, lookup_q)
    )
    seed = q.new_zeros(1, dtype=torch.int64)
    if dropout_p > 0:
        seed.random_()
    out, sums, _ = ops.attention(
        q,
        k,
        v,
        lookup_k,
        lookup_q,
        *buckets,
        key_padding,
        seed,
        want_sums,
        scale,
        dropout_p,
        chosen,
    )
    return out, sums if want_sums else None
