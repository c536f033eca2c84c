"""Public operators: validate, choose an implementation, call it."""

import torch
from torch import Tensor

from rpe_ops import implementations, ops, validation

__all__ = ["gather", "bucket_sum"]


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
        RuntimeError: An explicit implementation that cannot run here.
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
        RuntimeError: An explicit implementation that cannot run here.
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
    chosen = implementations.resolve(implementation, pairs.device)
    return ops.bucket_sum(pairs, index, num_buckets, chosen)
