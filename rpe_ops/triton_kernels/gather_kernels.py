"""Gather and bucket sum: every program computes one query, the gather for several slices.

    gather:      out[n, i, j] = lookup[n, i, bucket_ids[i, j]]
    bucket sum:  out[n, i, b] = Σ_j [bucket_ids[i, j] = b] · pairs[n, i, j]

where `n` is the slice, the index over all leading dimensions. Bucket ids out of range are ignored:
the gather returns 0 for them, and the bucket sum does not add their pairs. The bucket sum compares
every bucket id with a block of buckets. So no two programs write to the same place, and the order
of additions is fixed. Notation: rpe_ops/README.md.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rpe_ops.triton_kernels.launch import device_of

__all__ = ["gather", "bucket_sum"]

# Slices and keys in a tile of the gather.
_BLOCK_N = 8
_BLOCK_J = 128


@triton.jit(do_not_specialize=["leading", "queries", "keys", "num_buckets"])
def _gather_kernel(
    p_lookup, p_ids, p_out, leading, queries, keys, num_buckets,
    lookup_n, lookup_i, lookup_k, ids_i, ids_j,
    BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Gather a tile of slices and keys for one query."""
    pid = tl.program_id(0)
    blocks_j = tl.cdiv(keys, BLOCK_J)
    o_j = (pid % blocks_j * BLOCK_J + tl.arange(0, BLOCK_J)).to(tl.int64)
    i = (pid // blocks_j % queries).to(tl.int64)
    o_n = (pid // blocks_j // queries * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    m_j, m_n = o_j < keys, o_n < leading
    b_ids = tl.load(p_ids + i * ids_i + o_j * ids_j, mask=m_j, other=0).to(tl.int64)
    m_ids = (b_ids >= 0) & (b_ids < num_buckets) & m_j
    p_lookup += o_n[:, None] * lookup_n + i * lookup_i + b_ids[None, :] * lookup_k
    b_out = tl.load(p_lookup, mask=m_n[:, None] & m_ids[None, :], other=0.0)
    p_out += (o_n[:, None] * queries + i) * keys + o_j[None, :]
    tl.store(p_out, b_out, mask=m_n[:, None] & m_j[None, :])


@triton.jit(do_not_specialize=["queries", "keys", "num_buckets"])
def _bucket_sum_kernel(
    p_pairs, p_ids, p_out, queries, keys, num_buckets,
    pairs_n, pairs_i, pairs_j, ids_i, ids_j,
    WIDE: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sum the pairs of one query in one slice."""
    row = tl.program_id(0).to(tl.int64)
    n, i = row // queries, row % queries
    p_pairs += n * pairs_n + i * pairs_i
    p_ids += i * ids_i
    for first in range(0, num_buckets, BLOCK_K):
        o_buckets = first + tl.arange(0, BLOCK_K)
        b_sums = tl.zeros([BLOCK_J, BLOCK_K], WIDE)
        for start in range(0, keys, BLOCK_J):
            o_j = (start + tl.arange(0, BLOCK_J)).to(tl.int64)
            m_j = o_j < keys
            b_ids = tl.load(p_ids + o_j * ids_j, mask=m_j, other=-1)
            b_pairs = tl.load(p_pairs + o_j * pairs_j, mask=m_j, other=0.0).to(WIDE)
            b_sums += tl.where(b_ids[:, None] == o_buckets[None, :], b_pairs[:, None], 0.0)
        tl.store(p_out + row * num_buckets + o_buckets, tl.sum(b_sums, 0), o_buckets < num_buckets)


def gather(lookup: Tensor, bucket_ids: Tensor) -> Tensor:
    """Read the value of every pair's bucket; see `rpe_ops.gather`."""
    queries, keys = bucket_ids.shape
    out = lookup.new_empty(*lookup.shape[:-1], keys)
    if out.numel() == 0:
        return out
    flat = _flat(lookup)
    programs = triton.cdiv(len(flat), _BLOCK_N) * queries * triton.cdiv(keys, _BLOCK_J)
    with device_of(lookup):
        _gather_kernel[(programs,)](
            flat,
            bucket_ids,
            out,
            len(flat),
            queries,
            keys,
            lookup.shape[-1],
            *flat.stride(),
            *bucket_ids.stride(),
            BLOCK_N=_BLOCK_N,
            BLOCK_J=_BLOCK_J,
        )
    return out


def bucket_sum(pairs: Tensor, bucket_ids: Tensor, num_buckets: int) -> Tensor:
    """Sum the pairs of every bucket, in float32 or wider; see `rpe_ops.bucket_sum`."""
    queries, keys = bucket_ids.shape
    out = pairs.new_empty(*pairs.shape[:-1], num_buckets)
    if out.numel() == 0:
        return out
    flat = _flat(pairs)
    with device_of(pairs):
        _bucket_sum_kernel[(len(flat) * queries,)](
            flat,
            bucket_ids,
            out,
            queries,
            keys,
            num_buckets,
            *flat.stride(),
            *bucket_ids.stride(),
            WIDE=tl.float64 if pairs.dtype == torch.float64 else tl.float32,
            BLOCK_J=32,
            BLOCK_K=min(64, triton.next_power_of_2(num_buckets)),
        )
    return out


def _flat(x: Tensor) -> Tensor:
    """Flatten the leading dimensions, with a copy if their strides allow no view."""
    return x.flatten(0, -3) if x.ndim > 2 else x[None]
