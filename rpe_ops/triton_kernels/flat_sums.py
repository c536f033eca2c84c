"""Bucket sums of stored pairs, as products with one-hot vectors.

    sums[head, i, n] = Σ_j pairs[head, i, j] · [bucket(i, j) = n]

For a fixed token i this is a product of two matrices, `(heads, L)` and `(L, terms·K)`. The second
one is the same for all heads, so a program makes it from the bucket ids once for a block of heads,
and tensor cores do the rest. It works for every method, also for cross, where a column of the
second matrix has ones for one term only. Notation: rpe_ops/README.md.
"""

import triton
import triton.language as tl

from rpe_ops.triton_kernels.flat_tiles import FLAT_SIZES, FlatKind, pair_ids, pairs_stride
from rpe_ops.triton_kernels.grid_tiles import LOG2E
from rpe_ops.triton_kernels.launch import Launch, next_power_of_2, prepare

__all__ = ["prepare_sums"]


@triton.jit(do_not_specialize=FLAT_SIZES)
def _flat_sums_kernel(
    p_pairs, p_sums, p_ids, p_lse, p_shifts, pairs_l, ids_l, heads, first_head, tokens, blocks,
    other_blocks, num_lookups,
    HAS_SHIFTS: tl.constexpr, TERMS: tl.constexpr, BLOCK_HEADS: tl.constexpr,
    BLOCK_OTHER: tl.constexpr, BLOCK_SUMS: tl.constexpr,
):  # fmt: skip
    """Compute some sums of one token, for a block of heads."""
    pid = tl.program_id(0)
    own = pid // blocks
    o_heads = (pid % blocks * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)).to(tl.int64)
    m_heads = o_heads < heads
    o_sums = tl.program_id(1) * BLOCK_SUMS + tl.arange(0, BLOCK_SUMS)
    # Elements of a head, and with them offsets of heads, may be more than 2³¹.
    o_rows = o_heads * tokens + own
    o_all_rows = (first_head + o_heads) * tokens + own
    if HAS_SHIFTS:
        b_lse = LOG2E * tl.load(p_lse + o_all_rows, mask=m_heads, other=0.0)
        # A query without any key has weights of 0.
        b_lse = tl.where(b_lse == float("-inf"), 0.0, b_lse)
    HOT_DTYPE: tl.constexpr = (
        tl.bfloat16 if p_pairs.dtype.element_ty == tl.float32 else p_pairs.dtype.element_ty
    )
    b_sums = tl.zeros([BLOCK_HEADS, BLOCK_SUMS], tl.float32)
    for block in range(other_blocks):
        o_other = block * BLOCK_OTHER + tl.arange(0, BLOCK_OTHER)
        m_pairs = m_heads[:, None] & (o_other < pairs_l)[None, :]
        p_block = p_pairs + (o_rows[:, None] * pairs_l + o_other[None, :])
        b_pairs = tl.load(p_block, mask=m_pairs, other=0.0)
        # The ids are loaded again for every bucket, in a tile. Each thread then makes many adjacent
        # elements and stores them together.
        o_tile = o_other[None, :] + tl.zeros([BLOCK_SUMS, 1], tl.int32)
        b_ids0, b_ids1 = pair_ids(p_ids, ids_l, own, o_tile, TERMS)
        m_hot = b_ids0 == o_sums[:, None]
        if TERMS == 2:
            m_hot |= b_ids1 == o_sums[:, None]
        b_hot = tl.trans(tl.where(m_hot, 1.0, 0.0).to(HOT_DTYPE))
        if HAS_SHIFTS:
            # The weights of this block are relative to the maximum that was known there.
            b_shift = tl.load(p_shifts + o_rows * other_blocks + block, mask=m_heads, other=0.0)
            b_product = _exact_product(b_pairs, b_hot, tl.zeros_like(b_sums))
            b_sums += b_product * tl.exp2(b_shift - b_lse)[:, None]
        else:
            b_sums = _exact_product(b_pairs, b_hot, b_sums)
    p_sums += o_all_rows[:, None] * num_lookups + o_sums[None, :]
    tl.store(p_sums, b_sums, mask=m_heads[:, None] & (o_sums < num_lookups)[None, :])


@triton.jit
def _exact_product(b_pairs, b_hot, b_sums):
    """Add the product of pairs with zeros and ones; float32 is split in three bfloat16 numbers."""
    if b_pairs.dtype == tl.float32:
        for _ in tl.static_range(3):
            b_part = b_pairs.to(tl.bfloat16)
            b_sums = tl.dot(b_part, b_hot, b_sums)
            b_pairs -= b_part.to(tl.float32)
    else:
        b_sums = tl.dot(b_pairs, b_hot, b_sums)
    return b_sums


def prepare_sums(kind: FlatKind, first_head: int, heads: int, *, has_shifts: bool) -> Launch:
    """Return the launch that computes the bucket sums of some heads.

    Its tensors are:

    - pairs `(heads or more, L, stride)`, zero where the second token does not exist;
    - the sums of all heads, `(B, H, L, terms·K)`;
    - the bucket ids from `rpe_ops.compact_ids`;
    - `lse`, and shifts `(heads or more, L, blocks)`: the pairs of a block are weights times
      `2^(lse·log2(e) - shift)`. Without shifts the pairs are summed as they are.

    Args:
        kind: The kind of attention.
        first_head: First head of the result.
        heads: Number of heads.
        has_shifts: Whether there are shifts, for blocks of `kind.tiles.other` tokens.
    """
    tokens = kind.shape[2]
    block_other = kind.tiles.other if has_shifts else 64
    block_sums = min(128, max(16, next_power_of_2(kind.num_lookups)))
    block_heads = max(16, min(64, next_power_of_2(heads)))
    blocks = -(-heads // block_heads)
    numbers = {
        "pairs_l": pairs_stride(tokens),
        "ids_l": kind.ids_stride,
        "heads": heads,
        "first_head": first_head,
        "tokens": tokens,
        "blocks": blocks,
        "other_blocks": -(-tokens // block_other),
        "num_lookups": kind.num_lookups,
        "HAS_SHIFTS": has_shifts,
        "TERMS": kind.terms,
        "BLOCK_HEADS": block_heads,
        "BLOCK_OTHER": block_other,
        "BLOCK_SUMS": block_sums,
        "num_warps": 4,
        "num_stages": 2,
    }
    programs = (tokens * blocks, -(-kind.num_lookups // block_sums))
    return prepare(_flat_sums_kernel, programs, numbers)
