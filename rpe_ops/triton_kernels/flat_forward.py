"""Forward of fused attention over flattened tokens: one program for a block of queries of a head.

    logits = scale·q kᵀ + lookup_k[i, bucket(i, j)] + lookup_q[j, bucket(j, i)]
    A = dropout(softmax(logits)),  out = A v

This is FlashAttention-2 (Dao, 2023) with lookups that are loaded per pair (`flat_tiles`). For the
bucket sums of A, the weights of every tile are stored relative to the maximum that is known at that
tile, and `flat_sums` rescales and sums them. Notation: rpe_ops/README.md.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from rpe_ops.grid import GridBuckets
from rpe_ops.triton_kernels.dropout_mask import query_keys, survives
from rpe_ops.triton_kernels.flat_sums import prepare_sums
from rpe_ops.triton_kernels.flat_tiles import (
    FLAT_SIZES,
    PLANS,
    FlatKind,
    bias_and_ids,
    common_tensors,
    flat_kind,
    heads_per_pass,
    keep_keys,
    own_tokens,
    pairs_buffer,
)
from rpe_ops.triton_kernels.grid_tiles import LN2, LOG2E, load_rows
from rpe_ops.triton_kernels.launch import Launch, device_of, prepare, strides_of, with_rows

__all__ = ["lookup_forward"]


@triton.jit(do_not_specialize=FLAT_SIZES)
def _flat_forward_kernel(
    p_q, p_k, p_v, p_lk, p_lq, p_ids, p_padding, p_seed, p_out, p_lse, p_pairs, p_shifts,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, lk_b, lk_h, lk_l, lq_b, lq_h, lq_l,
    out_b, out_h, out_l, pairs_l, ids_l, heads, first_head, tokens, blocks, other_blocks,
    scale, threshold, keep_scale,
    HAS_K: tl.constexpr, HAS_Q: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    KEEP_PAIRS: tl.constexpr, TERMS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_OWN: tl.constexpr, BLOCK_OTHER: tl.constexpr,
):  # fmt: skip
    """Compute `out` and `lse` of the own queries, and store their weights if they are needed."""
    in_pass, head, o_q, m_q = own_tokens(first_head, blocks, tokens, BLOCK_OWN)
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    p_k += b * k_b + h * k_h
    p_v += b * v_b + h * v_h
    p_lk += b * lk_b + h * lk_h
    p_lq += b * lq_b + h * lq_h
    p_padding += b * tokens
    p_pairs += in_pass.to(tl.int64) * tokens * pairs_l
    p_shifts += in_pass.to(tl.int64) * tokens * other_blocks
    b_q = load_rows(p_q + b * q_b + h * q_h, q_l, o_q, m_q, DIM, BLOCK_DIM)
    # With a positive factor, the maximum can be taken before the multiplication.
    b_q = tl.where(scale < 0, -b_q, b_q)
    scale = tl.abs(scale)
    per_scale, scale = 1 / scale, scale * LOG2E
    if HAS_DROPOUT:
        b_key0, b_key1 = query_keys(p_seed, head, o_q)
    b_max = tl.full([BLOCK_OWN], float("-inf"), tl.float32)
    b_total = tl.zeros([BLOCK_OWN], tl.float32)
    b_out = tl.zeros([BLOCK_OWN, BLOCK_DIM], tl.float32)
    for block in range(other_blocks):
        o_k = block * BLOCK_OTHER + tl.arange(0, BLOCK_OTHER)
        m_k = o_k < tokens
        b_k = load_rows(p_k, k_l, o_k, m_k, DIM, BLOCK_DIM)
        # Lookups are the accumulator of the product, which saves an addition.
        b_bias, _, _ = bias_and_ids(
            p_ids, ids_l, p_lk, lk_l, p_lq, lq_l, o_q[:, None], o_k[None, :], tokens, per_scale,
            HAS_K, HAS_Q, False, TERMS,
        )  # fmt: skip
        b_logits = tl.dot(b_q, tl.trans(b_k), b_bias, input_precision="ieee")
        b_v = load_rows(p_v, v_l, o_k, m_k, DIM, BLOCK_DIM)
        m_k = keep_keys(p_padding, o_k, m_k, HAS_PADDING)
        b_logits = tl.where(m_k[None, :], b_logits, float("-inf"))
        b_new_max = tl.maximum(b_max, tl.max(b_logits, 1) * scale)
        # The maximum is -inf until a query has met a key, and -inf - -inf would be NaN.
        b_shift = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
        b_decay = tl.exp2(b_max - b_shift)
        b_weights = tl.exp2(b_logits * scale - b_shift[:, None])
        b_total = b_total * b_decay + tl.sum(b_weights, 1)
        b_max = b_new_max
        if HAS_DROPOUT:
            m_keep = survives(b_key0[:, None], b_key1[:, None], o_k[None, :], threshold)
            b_weights = tl.where(m_keep, b_weights * keep_scale, 0.0)
        b_weights = b_weights.to(b_v.dtype)
        if KEEP_PAIRS:
            m_pairs = m_q[:, None] & (o_k < pairs_l)[None, :]
            tl.store(p_pairs + (o_q[:, None] * pairs_l + o_k[None, :]), b_weights, mask=m_pairs)
            tl.store(p_shifts + (o_q * other_blocks + block), b_shift, mask=m_q)
        b_out *= b_decay[:, None]
        b_out += tl.dot(b_weights, b_v, input_precision="ieee")
    # One division per query is cheaper than one per element.
    b_out *= (1 / tl.where(b_total > 0, b_total, 1.0))[:, None]
    o_dim = tl.arange(0, BLOCK_DIM)
    p_out += b * out_b + h * out_h + o_q[:, None] * out_l + o_dim[None, :]
    tl.store(p_out, b_out, mask=m_q[:, None] & (o_dim < DIM)[None, :])
    p_lse += head.to(tl.int64) * tokens + o_q
    tl.store(p_lse, (b_max + tl.log2(b_total)) * LN2, mask=m_q)


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
    *,
    wide: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend, with head dims up to 128 and no float64; see `rpe_ops.reference.lookup_forward`.

    `wide` is that of `choose_flat_tiles`.
    """
    batch, heads, tokens, dim = q.shape
    given = (lookup_k is not None, lookup_q is not None, needs_sums, key_padding is not None)
    kind = flat_kind(q, buckets, *given, scale, dropout_p, backward=False, wide=wide)
    out = q.new_empty(batch, tokens, heads, dim).transpose(1, 2)
    lse = q.new_empty(batch, heads, tokens, dtype=torch.float32)
    size = heads_per_pass(q, copies=int(needs_sums))
    pairs, sums, shifts = q, q.new_empty(0), q
    if needs_sums:
        pairs = pairs_buffer(q, size)
        sums = q.new_empty(batch, heads, tokens, kind.num_lookups)
        shifts = lse.new_empty(size, tokens, -(-tokens // kind.tiles.other))
    lookups = (q if lookup is None else lookup for lookup in (lookup_k, lookup_q))
    operands = [with_rows(x) for x in (q, k, v, *lookups, out)]
    assert operands[5] is out, "the output of a head spans too much memory"
    ids, *rest = common_tensors(q, kind, buckets, key_padding, seed)
    tensors = (*operands[:5], ids, *rest, out, lse, pairs, shifts)
    with device_of(q):
        for attend, sum_pairs in _plan(kind, size, tuple(x.stride() for x in operands)):
            attend.run(*tensors)
            if needs_sums:
                sum_pairs.run(pairs, sums, ids, lse, shifts)
    return out, sums, lse


@functools.lru_cache(maxsize=PLANS)
def _plan(
    kind: FlatKind, size: int, strides: tuple[tuple[int, ...], ...]
) -> tuple[tuple[Launch, Launch], ...]:
    """Return the launches of attention and of the bucket sums, for every pass of `size` heads."""
    numbers = kind.numbers() | strides_of(("q", "k", "v", "lk", "lq", "out"), strides)
    numbers["KEEP_PAIRS"] = kind.has_sums
    plan = []
    for first, heads in kind.passes(size):
        numbers["first_head"] = first
        attend = prepare(_flat_forward_kernel, (heads * numbers["blocks"],), numbers)
        plan.append((attend, prepare_sums(kind, first, heads, has_shifts=True)))
    return tuple(plan)
