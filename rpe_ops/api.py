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
    validation.check_bucket_ids(index, lookup.shape[-2], lookup.device)
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
    validation.check_bucket_ids(index, pairs.shape[-2], pairs.device)
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
    table_k: Tensor | None = None,
    table_q: Tensor | None = None,
    table_v: Tensor | None = None,
    key_padding: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    implementation: str = "auto",
) -> Tensor:
    """Attend with encodings that read tables by the bucket of a pair.

        logits[i, j] = scale·q_i·(k_j + T_k[bucket(i, j)]) + scale·k_j·T_q[bucket(j, i)]
        A = dropout(softmax(logits));  out_i = Σ_j A[i, j]·(v_j + T_v[bucket(i, j)])

    with the T terms of the buckets added, each of K buckets (`GridBuckets`). Products with the
    tables come first, `O(L·K·d)` in all, and nothing of size L × L is held, forward or backward,
    but by the implementation "reference". Differentiable once in `q`, `k`, `v` and the tables;
    float16 and bfloat16 are accumulated in float32. The mask of dropout is drawn from torch's
    generator and is the same in the backward.

    Args:
        q: Queries `(B, H, L, d)`, float16, bfloat16, float32 (float64 on the CPU); any strides.
        k: Keys, like `q`.
        v: Values, like `q`.
        buckets: The grid's buckets, on the same device, `L` tokens in all.
        table_k: `(Hs, d, T·K)` in the dtype of `q`, with `Hs` 1 or `H`, read by the queries; or a
            bias `(Hs, T·K)`, added to the logits as it is.
        table_q: The same, read by the keys.
        table_v: `(Hs, T·K, d)`, read by the attention weights.
        key_padding: `(B, L)` bool, True on keys that nothing attends to. A query left without any
            key yields zeros.
        dropout_p: Probability of dropping an attention weight, in [0, 1).
        scale: Factor on the products, finite and not 0, default `d**-0.5`.
        implementation: `"auto"` or a name in `rpe_ops.IMPLEMENTATIONS`.

    Returns:
        `(B, H, L, d)` in the dtype of `q`.

    Raises:
        ValueError: A wrong shape, dtype, device, probability or implementation name.
        ImplementationError: An explicit implementation that cannot run here.
    """
    tables = {"table_k": table_k, "table_q": table_q, "table_v": table_v}
    validation.check_attention(q, k, v, buckets, tables, key_padding, dropout_p, scale)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    chosen = implementations.resolve(implementation, q.device, "attention")
    if reason := implementations.reason_against_input(chosen, q):
        raise ValueError(reason)
    seed = q.new_zeros(1, dtype=torch.int64)
    if dropout_p > 0:
        seed.random_()
    rest = (key_padding, seed, scale, dropout_p, chosen)
    out, _, _ = ops.attention(q, k, v, *tables.values(), *buckets, *rest)
    return out
