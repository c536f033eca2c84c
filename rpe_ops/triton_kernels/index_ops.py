"""Gather and bucket sum, one row of queries for a program.

    gather:      out[n, i, j] = lookup[n, i, index[i, j]]
    bucket sum:  out[n, i, b] = Σ_j [index[i, j] = b] · pairs[n, i, j]

with all leading dimensions in `n`. Buckets out of range are left out: they read as 0 and are added
nowhere. The bucket sum compares every index with a block of buckets, so that no two programs write
to one place and the order of additions is fixed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rpe_ops.triton_kernels.launch import device_of

__all__ = ["gather", "bucket_sum"]

# Leading rows that share a row of the index, and its columns, in a tile of the gather.
_BLOCK_N = 8
_BLOCK_J = 128


@triton.jit(do_not_specialize=["leading", "queries", "keys", "num_buckets"])
def _gather_kernel(
    p_lookup, p_index, p_out, leading, queries, keys, num_buckets,
    lookup_n, lookup_i, lookup_k, index_i, index_j,
    BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    blocks_j = tl.cdiv(keys, BLOCK_J)
    o_j = (pid % blocks_j * BLOCK_J + tl.arange(0, BLOCK_J)).to(tl.int64)
    i = (pid // blocks_j % queries).to(tl.int64)
    o_n = (pid // blocks_j // queries * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    m_j, m_n = o_j < keys, o_n < leading
    b_index = tl.load(p_index + i * index_i + o_j * index_j, mask=m_j, other=0).to(tl.int64)
    m_index = (b_index >= 0) & (b_index < num_buckets) & m_j
    p_lookup += o_n[:, None] * lookup_n + i * lookup_i + b_index[None, :] * lookup_k
    b_out = tl.load(p_lookup, mask=m_n[:, None] & m_index[None, :], other=0.0)
    p_out += (o_n[:, None] * queries + i) * keys + o_j[None, :]
    tl.store(p_out, b_out, mask=m_n[:, None] & m_j[None, :])


@triton.jit(do_not_specialize=["queries", "keys", "num_buckets"])
def _bucket_sum_kernel(
    p_pairs, p_index, p_out, queries, keys, num_buckets,
    pairs_n, pairs_i, pairs_j, index_i, index_j,
    WIDE: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    n, i = row // queries, row % queries
    p_pairs += n * pairs_n + i * pairs_i
    p_index += i * index_i
    for first in range(0, num_buckets, BLOCK_K):
        o_buckets = first + tl.arange(0, BLOCK_K)
        b_sums = tl.zeros([BLOCK_J, BLOCK_K], WIDE)
        for start in range(0, keys, BLOCK_J):
            o_j = (start + tl.arange(0, BLOCK_J)).to(tl.int64)
            m_j = o_j < keys
            b_index = tl.load(p_index + o_j * index_j, mask=m_j, other=-1)
            b_pairs = tl.load(p_pairs + o_j * pairs_j, mask=m_j, other=0.0).to(WIDE)
            b_sums += tl.where(b_index[:, None] == o_buckets[None, :], b_pairs[:, None], 0.0)
        tl.store(p_out + row * num_buckets + o_buckets, tl.sum(b_sums, 0), o_buckets < num_buckets)


def gather(lookup: Tensor, index: Tensor) -> Tensor:
    """Spread per-bucket values over the pairs; see `rpe_ops.gather`."""
    queries, keys = index.shape
    out = lookup.new_empty(*lookup.shape[:-1], keys)
    if out.numel() == 0:
        return out
    flat = _flat(lookup)
    programs = triton.cdiv(len(flat), _BLOCK_N) * queries * triton.cdiv(keys, _BLOCK_J)
    with device_of(lookup):
        _gather_kernel[(programs,)](
            flat,
            index,
            out,
            len(flat),
            queries,
            keys,
            lookup.shape[-1],
            *flat.stride(),
            *index.stride(),
            BLOCK_N=_BLOCK_N,
            BLOCK_J=_BLOCK_J,
        )
    return out


def bucket_sum(pairs: Tensor, index: Tensor, num_buckets: int) -> Tensor:
    """Sum the pairs of every bucket, low precision in float32; see `rpe_ops.bucket_sum`."""
    queries, keys = index.shape
    out = pairs.new_empty(*pairs.shape[:-1], num_buckets)
    if out.numel() == 0:
        return out
    flat = _flat(pairs)
    with device_of(pairs):
        _bucket_sum_kernel[(len(flat) * queries,)](
            flat,
            index,
            out,
            queries,
            keys,
            num_buckets,
            *flat.stride(),
            *index.stride(),
            WIDE=tl.float64 if pairs.dtype == torch.float64 else tl.float32,
            BLOCK_J=32,
            BLOCK_K=min(64, triton.next_power_of_2(num_buckets)),
        )
    return out


def _flat(x: Tensor) -> Tensor:
    """All leading dimensions as one; copied where their strides do not allow a view."""
    return x.flatten(0, -3) if x.ndim > 2 else x[None]
