"""Bucket sums of the attention weights, recomputed from the `lse` of the forward.

    sums[i, n] = Σ_j [bucket(i, j) = n] A_ij,   A = dropout(exp(logits - lse))

Notation: rpe_ops/README.md.
"""

import triton
import triton.language as tl
from torch import Tensor

from rpe_ops.grid import GridBuckets
from rpe_ops.triton_kernels.dropout_mask import query_keys, survives
from rpe_ops.triton_kernels.grid_tiles import (
    LOG2E,
    add_by_local,
    enter_run,
    finish_run,
    load_rows,
    own_columns,
    row_tokens,
    run_end,
    tile_logits,
)
from rpe_ops.triton_kernels.launch import RUNTIME_SIZES, matrices, sums_block

__all__ = ["attention_sums"]


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def _sums_kernel(
    p_q, p_k, p_lk, p_lq, p_row_base, p_local, p_padding, p_seed, p_lse, p_sums,
    q_b, q_h, q_l, k_b, k_h, k_l, lk_b, lk_h, lk_l, lq_b, lq_h, lq_l,
    heads, height, width, skip, num_buckets, run_width, tiles, own_chunks, other_chunks,
    scale, threshold, keep_scale,
    HAS_K: tl.constexpr, HAS_Q: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    HAS_SKIP: tl.constexpr, TERMS: tl.constexpr, SEPARABLE: tl.constexpr,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_OWN: tl.constexpr, BLOCK_OTHER: tl.constexpr, BLOCK_SUMS: tl.constexpr,
):  # fmt: skip
    """Compute the bucket sums of the own queries."""
    tokens = skip + height * width
    head, row, o_columns = own_columns(tiles, own_chunks, HAS_SKIP, BLOCK_OWN)
    o_q, m_q = row_tokens(row, o_columns, width, skip)
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    p_k += b * k_b + h * k_h
    p_lk += b * lk_b + h * lk_h
    p_lq += b * lq_b + h * lq_h
    p_padding += b * tokens
    b_q = load_rows(p_q + b * q_b + h * q_h, q_l, o_q, m_q, DIM, BLOCK_DIM)
    o_out = head.to(tl.int64) * tokens + o_q
    b_lse = LOG2E * tl.load(p_lse + o_out, mask=m_q, other=0.0)
    # An lse of inf gives weights of 0. It is set for queries without any key and outside the grid.
    b_lse = tl.where(m_q & (b_lse != float("-inf")), b_lse, float("inf"))
    if HAS_DROPOUT:
        b_key0, b_key1 = query_keys(p_seed, head, o_q)
    p_sums += o_out * (TERMS * num_buckets)
    b_sums1 = tl.zeros([BLOCK_OWN, BLOCK_SUMS], tl.float32)
    b_sums0 = tl.zeros([BLOCK_OWN, 16 if TERMS == 2 else BLOCK_SUMS], tl.float32)
    first = row * 0 - HAS_SKIP
    while first < height:
        end = run_end(p_row_base, row, first, height, TERMS, SEPARABLE, True, BLOCK_ROWS)
        for chunk in range(other_chunks):
            o_others = chunk * BLOCK_OTHER + tl.arange(0, BLOCK_OTHER)
            b_local0, b_local1, b_back0, b_back1, b_bias = enter_run(
                p_row_base, p_local, p_lk, lk_l, row, first, o_q, m_q, o_columns, o_others,
                height, width, num_buckets, scale, HAS_K, HAS_Q, TERMS, SEPARABLE,
            )  # fmt: skip
            b_run = tl.zeros([BLOCK_OWN, BLOCK_OTHER], tl.float32)
            for other_row in range(first, end):
                o_k, m_k = row_tokens(other_row, o_others, width, skip)
                b_k = load_rows(p_k, k_l, o_k, m_k, DIM, BLOCK_DIM)
                b_logits = tile_logits(
                    b_q, b_k, b_bias, scale, p_row_base, p_lq, lq_l, row, other_row, o_k, m_k,
                    b_back0, b_back1, height, num_buckets, HAS_Q, TERMS,
                )  # fmt: skip
                if HAS_PADDING:
                    m_k &= tl.load(p_padding + o_k, mask=m_k, other=1) == 0
                b_logits = tl.where(m_k[None, :], b_logits, float("-inf"))
                b_weights = tl.exp2(b_logits - b_lse[:, None])
                if HAS_DROPOUT:
                    m_keep = survives(b_key0[:, None], b_key1[:, None], o_k[None, :], threshold)
                    b_weights = tl.where(m_keep, b_weights * keep_scale, 0.0)
                b_run += b_weights
            b_sums0 = add_by_local(b_sums0, b_run, b_local0)
            if TERMS == 2:
                b_sums1 = add_by_local(b_sums1, b_run, b_local1)
        b_sums0, b_sums1 = finish_run(
            p_sums, b_sums0, b_sums1, m_q, p_row_base, row, first, end, height, num_buckets,
            run_width, TERMS,
        )  # fmt: skip
        first = end


def attention_sums(q: Tensor, k: Tensor, lse: Tensor, buckets: GridBuckets, common: dict) -> Tensor:
    """Return sums `(B, H, L, terms·K)` in the dtype of `q`.

    `common` holds the common arguments of the forward kernel.
    """
    batch, heads, tokens, _ = q.shape
    # The kernel does not write buckets without any key, so they must be zero before.
    sums = q.new_zeros(batch, heads, tokens, buckets.num_lookups)
    _sums_kernel[(batch * heads * common["tiles"],)](
        **matrices(q=q, k=k),
        **common,
        p_lse=lse,
        p_sums=sums,
        run_width=buckets.run_width,
        BLOCK_SUMS=sums_block(buckets),
    )
    return sums
