"""Public operators: check the arguments, choose an implementation, call it.

Notation: rpe_ops/README.md.
"""

import torch
from torch import Tensor

from rpe_ops import implementations, ops, validation
from rpe_ops.grid import GridBuckets

__all__ = ["gather", "bucket_sum", "attention"]


def gather(
    lookup: Tensor, bucket_ids: Tensor, *, implementation: str = "auto", check_bounds: bool = True
) -> Tensor:
    """Read the value of every pair's bucket.

        out[..., i, j] = lookup[..., i, bucket_ids[i, j]]

    Differentiable in `lookup` to any order; the backward is `bucket_sum`.

    Args:
        lookup: `(..., L_q, K)` float16, bfloat16, float32 or float64, one value per query and
            bucket; any strides.
        bucket_ids: `(L_q, L_k)` int32 or int64, the bucket id of every pair.
        implementation: `"auto"` or a name in `rpe_ops.IMPLEMENTATIONS`.
        check_bounds: Check that the bucket ids are in `[0, K)`. The check waits for a GPU; switch
            it off only for bucket ids that are correct by construction. It is skipped inside
            `torch.compile`.

    Returns:
        `(..., L_q, L_k)` in the dtype of `lookup`.

    Raises:
        ValueError: A shape, dtype, device or implementation name is wrong.
        IndexError: A bucket id is out of range.
        ImplementationError: The implementation that was named cannot run here.
    """
    validation.check_floating("lookup", lookup)
    validation.check_bucket_ids(bucket_ids, lookup.shape[-2], lookup.device)
    if check_bounds and not torch.compiler.is_compiling():
        validation.check_bounds(bucket_ids, lookup.shape[-1])
    return ops.gather(lookup, bucket_ids, implementations.resolve(implementation, lookup.device))


def bucket_sum(
    pairs: Tensor,
    bucket_ids: Tensor,
    num_buckets: int,
    *,
    implementation: str = "auto",
    check_bounds: bool = True,
) -> Tensor:
    """Sum the pairs of every bucket.

        out[..., i, n] = Σ_j [bucket_ids[i, j] = n] · pairs[..., i, j]

    Differentiable in `pairs` to any order; the backward is `gather`. float16 and bfloat16 are
    accumulated in float32.

    Args:
        pairs: `(..., L_q, L_k)` float16, bfloat16, float32 or float64, one value per query and
            key; any strides.
        bucket_ids: `(L_q, L_k)` int32 or int64, the bucket id of every pair.
        num_buckets: `K`, from 1 to 2²⁰.
        implementation: `"auto"` or a name in `rpe_ops.IMPLEMENTATIONS`.
        check_bounds: As in `gather`.

    Returns:
        `(..., L_q, K)` in the dtype of `pairs`.

    Raises:
        ValueError: A shape, dtype, device, number of buckets or implementation name is wrong.
        IndexError: A bucket id is out of range.
        ImplementationError: The implementation that was named cannot run here.
    """
    validation.check_floating("pairs", pairs)
    validation.check_bucket_ids(bucket_ids, pairs.shape[-2], pairs.device)
    if bucket_ids.shape[-1] != pairs.shape[-1]:
        raise ValueError(
            f"bucket_ids must have as many keys as pairs, {pairs.shape[-1]}, "
            f"got {bucket_ids.shape[-1]}"
        )
    validation.check_num_buckets(num_buckets)
    if check_bounds and not torch.compiler.is_compiling():
        validation.check_bounds(bucket_ids, num_buckets)
    chosen = implementations.resolve(implementation, pairs.device, "bucket_sum")
    return ops.bucket_sum(pairs, bucket_ids, num_buckets, chosen)


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
    """Attend with relative position encodings that are read from tables.

        logits[i, j] = scale·q_i·(k_j + T_k[bucket(i, j)]) + scale·k_j·T_q[bucket(j, i)]
        A = dropout(softmax(logits));  out_i = Σ_j A[i, j]·(v_j + T_v[bucket(i, j)])

    A pair has one bucket in each of the `terms` of `buckets`, and the encodings of the terms are
    added. The products with the tables are computed first, at a cost of `O(L·K·d)`. Only the
    implementation "reference" holds all pairs `(B, H, L, L)`. On small grids, "triton" holds the
    pairs of some heads at a time: 32 MiB, or 16 heads if that is more. Differentiable once in `q`,
    `k`, `v` and the tables. float16 and bfloat16 are accumulated in float32. The seed of dropout is
    drawn from torch's generator, and the backward uses the same mask.

    Args:
        q: Queries `(B, H, L, d)`, float16, bfloat16, float32 (float64 on the CPU); any strides.
        k: Keys, like `q`.
        v: Values, like `q`.
        buckets: Buckets of the grid, for `L` tokens, on the device of `q`.
        table_k: `(Hs, d, terms·K)` in the dtype of `q`, with `Hs` 1 or `H`, multiplied by the
            queries; or a bias `(Hs, terms·K)`, added to the logits without a product.
        table_q: The same, multiplied by the keys.
        table_v: `(Hs, terms·K, d)`, multiplied by the bucket sums of the attention weights.
        key_padding: `(B, L)` bool, True on keys that no query attends to. A query without any key
            yields zeros.
        dropout_p: Probability of dropping an attention weight, in [0, 1).
        scale: Factor on the products, finite and not 0, default `d**-0.5`.
        implementation: `"auto"` or a name in `rpe_ops.IMPLEMENTATIONS`.

    Returns:
        `(B, H, L, d)` in the dtype of `q`.

    Raises:
        ValueError: A shape, dtype, device, probability or implementation name is wrong.
        ImplementationError: The implementation that was named cannot run here.
    """
    tables = {"table_k": table_k, "table_q": table_q, "table_v": table_v}
    validation.check_attention(q, k, v, buckets, tables, key_padding, dropout_p, scale)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    chosen = implementations.resolve(implementation, q.device, "attention")
    if reason := implementations.reason_against_input(chosen, q):
        raise ValueError(reason)
    # Without dropout, the seed has no effect.
    seed = q.new_empty(1, dtype=torch.int64)
    if dropout_p > 0:
        seed.random_()
    rest = (buckets, key_padding, seed, scale, dropout_p, chosen)
    return ops.attend(q, k, v, table_k, table_q, table_v, *rest)
