"""Backward of fused attention over flattened tokens.

    dA = dO vᵀ + dsums[i, bucket(i, j)],  dP = dropout(dA),  dS = P·(dP - delta)
    dq = scale·dS k,  dk = scale·dSᵀ q,  dv = Aᵀ dO,  dlookup = the bucket sums of dS or dSᵀ

`delta = dO·out + dsums·sums` is an argument, and P is recomputed from `lse` (Dao,
"FlashAttention-2", 2023). Unlike there, P is recomputed only once: the kernel that owns the keys
stores dS for a limited number of heads, and dq and the gradients of the lookups are sums of it.
Every element is summed by one program in a fixed order. Notation: rpe_ops/README.md.
"""

import functools

import triton
import triton.language as tl
from torch import Tensor

from rpe_ops.grid import GridBuckets
from rpe_ops.triton_kernels.dropout_mask import survives
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
    pair_lookups,
    pairs_buffer,
    pairs_stride,
)
from rpe_ops.triton_kernels.grid_tiles import LOG2E, load_queries, load_rows
from rpe_ops.triton_kernels.launch import Launch, device_of, prepare, strides_of, with_rows

__all__ = ["lookup_backward"]


@triton.jit(do_not_specialize=FLAT_SIZES)
def _flat_keys_kernel(
    p_q, p_k, p_v, p_do, p_lk, p_lq, p_gs, p_ids, p_padding, p_seed, p_lse, p_delta,
    p_dk, p_dv, p_rows, p_columns,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, do_b, do_h, do_l,
    lk_b, lk_h, lk_l, lq_b, lq_h, lq_l, gs_b, gs_h, gs_l, dk_b, dk_h, dk_l, dv_b, dv_h, dv_l,
    pairs_l, ids_l, heads, first_head, tokens, blocks, other_blocks,
    scale, threshold, keep_scale,
    HAS_K: tl.constexpr, HAS_Q: tl.constexpr, HAS_SUMS: tl.constexpr, HAS_PADDING: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, STORE_ROWS: tl.constexpr, STORE_COLUMNS: tl.constexpr,
    TERMS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_OWN: tl.constexpr, BLOCK_OTHER: tl.constexpr,
):  # fmt: skip
    """Compute dk and dv of the own keys, and store dS by rows (i, j) or by columns (j, i)."""
    in_pass, head, o_k, m_k = own_tokens(first_head, blocks, tokens, BLOCK_OWN)
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    p_q += b * q_b + h * q_h
    p_do += b * do_b + h * do_h
    p_lk += b * lk_b + h * lk_h
    p_lq += b * lq_b + h * lq_h
    p_gs += b * gs_b + h * gs_h
    p_lse += head.to(tl.int64) * tokens
    p_delta += head.to(tl.int64) * tokens
    p_rows += in_pass.to(tl.int64) * tokens * pairs_l
    p_columns += in_pass.to(tl.int64) * tokens * pairs_l
    b_k = load_rows(p_k + b * k_b + h * k_h, k_l, o_k, m_k, DIM, BLOCK_DIM)
    b_v = load_rows(p_v + b * v_b + h * v_h, v_l, o_k, m_k, DIM, BLOCK_DIM)
    m_keys = keep_keys(p_padding + b * tokens, o_k, m_k, HAS_PADDING)[:, None]
    per_scale = 1 / scale
    b_dk = tl.zeros([BLOCK_OWN, BLOCK_DIM], tl.float32)
    b_dv = tl.zeros([BLOCK_OWN, BLOCK_DIM], tl.float32)
    for block in range(other_blocks):
        o_q = block * BLOCK_OTHER + tl.arange(0, BLOCK_OTHER)
        m_q = o_q < tokens
        b_q = load_rows(p_q, q_l, o_q, m_q, DIM, BLOCK_DIM)
        b_do = load_rows(p_do, do_l, o_q, m_q, DIM, BLOCK_DIM)
        b_lse, b_delta, b_key0, b_key1 = load_queries(
            p_lse, p_delta, p_seed, head, o_q, m_q, HAS_DROPOUT
        )
        b_bias, b_ids0, b_ids1 = bias_and_ids(
            p_ids, ids_l, p_lk, lk_l, p_lq, lq_l, o_q[None, :], o_k[:, None], tokens, per_scale,
            HAS_K, HAS_Q, HAS_SUMS, TERMS,
        )  # fmt: skip
        b_logits = tl.dot(b_k, tl.trans(b_q), b_bias, input_precision="ieee")
        b_weights = tl.exp2(b_logits * (scale * LOG2E) - b_lse[None, :])
        b_weights = tl.where(m_keys, b_weights, 0.0)
        b_gs = tl.zeros([BLOCK_OWN, BLOCK_OTHER], tl.float32)
        if HAS_SUMS:
            b_gs = pair_lookups(p_gs, gs_l, o_q[None, :], tokens, b_ids0, b_ids1, TERMS)
        b_dweights = tl.dot(b_v, tl.trans(b_do), b_gs, input_precision="ieee")
        b_kept = b_weights
        if HAS_DROPOUT:
            m_keep = survives(b_key0[None, :], b_key1[None, :], o_k[:, None], threshold)
            b_dweights = tl.where(m_keep, b_dweights * keep_scale, 0.0)
            b_kept = tl.where(m_keep, b_weights * keep_scale, 0.0)
        b_dv += tl.dot(b_kept.to(b_do.dtype), b_do, input_precision="ieee")
        b_dlogits = (b_weights * (b_dweights - b_delta[None, :])).to(b_q.dtype)
        b_dk += tl.dot(b_dlogits, b_q, input_precision="ieee")
        # Columns up to the stride are written, because the sums read them.
        if STORE_ROWS:
            p_block = p_rows + (o_q[None, :] * pairs_l + o_k[:, None])
            tl.store(p_block, b_dlogits, mask=m_q[None, :] & (o_k < pairs_l)[:, None])
        if STORE_COLUMNS:
            p_block = p_columns + (o_k[:, None] * pairs_l + o_q[None, :])
            tl.store(p_block, b_dlogits, mask=m_k[:, None] & (o_q < pairs_l)[None, :])
    o_dim = tl.arange(0, BLOCK_DIM)
    m_rows = m_k[:, None] & (o_dim < DIM)[None, :]
    p_dk += b * dk_b + h * dk_h + o_k[:, None] * dk_l + o_dim[None, :]
    p_dv += b * dv_b + h * dv_h + o_k[:, None] * dv_l + o_dim[None, :]
    tl.store(p_dk, b_dk * scale, mask=m_rows)
    tl.store(p_dv, b_dv, mask=m_rows)


@triton.jit(do_not_specialize=FLAT_SIZES)
def _flat_queries_kernel(
    p_k, p_pairs, p_dq, k_b, k_h, k_l, dq_b, dq_h, dq_l, pairs_q, pairs_k, pairs_l,
    heads, first_head, tokens, blocks, other_blocks, scale,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_OWN: tl.constexpr, BLOCK_OTHER: tl.constexpr,
):  # fmt: skip
    """Compute dq of the own queries from dS, whose strides are `pairs_q` and `pairs_k`."""
    in_pass, head, o_q, m_q = own_tokens(first_head, blocks, tokens, BLOCK_OWN)
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    p_k += b * k_b + h * k_h
    p_pairs += in_pass.to(tl.int64) * tokens * pairs_l
    b_dq = tl.zeros([BLOCK_OWN, BLOCK_DIM], tl.float32)
    for block in range(other_blocks):
        o_k = block * BLOCK_OTHER + tl.arange(0, BLOCK_OTHER)
        m_k = o_k < tokens
        b_k = load_rows(p_k, k_l, o_k, m_k, DIM, BLOCK_DIM)
        p_block = p_pairs + (o_q[:, None] * pairs_q + o_k[None, :] * pairs_k)
        b_pairs = tl.load(p_block, mask=m_q[:, None] & m_k[None, :], other=0.0)
        b_dq += tl.dot(b_pairs, b_k, input_precision="ieee")
    o_dim = tl.arange(0, BLOCK_DIM)
    p_dq += b * dq_b + h * dq_h + o_q[:, None] * dq_l + o_dim[None, :]
    tl.store(p_dq, b_dq * scale, mask=m_q[:, None] & (o_dim < DIM)[None, :])


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
    *,
    wide: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Compute the gradients of q, k, v and the lookups; see `rpe_ops.reference.lookup_backward`.

    `wide` is that of `choose_flat_tiles`.
    """
    batch, heads, tokens, dim = q.shape
    grad_q, grad_k, grad_v = (
        q.new_empty(batch, tokens, heads, dim).transpose(1, 2) for _ in range(3)
    )
    grad_lookup_k, grad_lookup_q = (
        None if lookup is None else q.new_empty(lookup.shape) for lookup in (lookup_k, lookup_q)
    )
    given = [x is not None for x in (lookup_k, lookup_q, grad_sums, key_padding)]
    kind = flat_kind(q, buckets, *given, scale, dropout_p, backward=True, wide=wide)
    by_rows, by_columns = _orders(kind)
    size = heads_per_pass(q, copies=by_rows + by_columns)
    rows, columns = (pairs_buffer(q, size) if stored else q for stored in (by_rows, by_columns))
    absent = (q if x is None else x for x in (lookup_k, lookup_q, grad_sums))
    operands = [with_rows(x) for x in (q, k, v, grad_out, *absent, grad_q, grad_k, grad_v)]
    # All three gradients have the same strides.
    assert operands[7] is grad_q, "the gradient of a head spans too much memory"
    ids, *rest = common_tensors(q, kind, buckets, key_padding, seed)
    of_keys = (*operands[:7], ids, *rest, lse, delta, grad_k, grad_v, rows, columns)
    of_queries = (operands[1], rows if by_rows else columns, grad_q)
    with device_of(q):
        for keys, queries, sum_pairs in _plan(kind, size, tuple(x.stride() for x in operands)):
            keys.run(*of_keys)
            queries.run(*of_queries)
            for pairs, grad in ((rows, grad_lookup_k), (columns, grad_lookup_q)):
                if grad is not None:
                    # Without shifts, `lse` and shifts are not read.
                    sum_pairs.run(pairs, grad, ids, pairs, pairs)
    return grad_q, grad_k, grad_v, grad_lookup_k, grad_lookup_q


def _orders(kind: FlatKind) -> tuple[bool, bool]:
    """Return whether dS is stored by rows and by columns.

    The sums for lookup_k need it by rows, those for lookup_q by columns; dq can read both.
    """
    return kind.has_k or not kind.has_q, kind.has_q


@functools.lru_cache(maxsize=PLANS)
def _plan(
    kind: FlatKind, size: int, strides: tuple[tuple[int, ...], ...]
) -> tuple[tuple[Launch, Launch, Launch], ...]:
    """Return the launches of keys, queries and bucket sums, for every pass of `size` heads."""
    names = ("q", "k", "v", "do", "lk", "lq", "gs", "dq", "dk", "dv")
    by_rows, by_columns = _orders(kind)
    stride = pairs_stride(kind.shape[2])
    numbers = {
        **kind.numbers(),
        **strides_of(names, strides),
        "pairs_q": stride if by_rows else 1,
        "pairs_k": 1 if by_rows else stride,
        "STORE_ROWS": by_rows,
        "STORE_COLUMNS": by_columns,
    }
    plan = []
    for first, heads in kind.passes(size):
        numbers["first_head"] = first
        programs = (heads * numbers["blocks"],)
        keys = prepare(_flat_keys_kernel, programs, numbers)
        queries = prepare(_flat_queries_kernel, programs, numbers)
        plan.append((keys, queries, prepare_sums(kind, first, heads, has_shifts=False)))
    return tuple(plan)
