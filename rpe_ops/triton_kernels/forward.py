"""Forward of fused attention: one program for the queries of one grid row in one head.

    logits = scale·q kᵀ + lookup_k[i, bucket(i, j)] + lookup_q[j, bucket(j, i)]
    A = dropout(softmax(logits)),  out = A v

The softmax is computed online (Dao, "FlashAttention-2", 2023), with logits in base 2. Unlike there,
the loop over the keys follows the rows of the grid, in runs of equal buckets (`grid_tiles`).
Notation: rpe_ops/README.md.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rpe_ops.grid import GridBuckets
from rpe_ops.triton_kernels.dropout_mask import query_keys, survives
from rpe_ops.triton_kernels.grid_tiles import (
    LN2,
    enter_run,
    load_rows,
    own_columns,
    row_tokens,
    run_end,
    tile_logits,
)
from rpe_ops.triton_kernels.launch import (
    RUNTIME_SIZES,
    choose_tiles,
    common_arguments,
    device_of,
    matrices,
)
from rpe_ops.triton_kernels.sums import attention_sums

__all__ = ["lookup_forward"]


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def _forward_kernel(
    p_q, p_k, p_v, p_lk, p_lq, p_row_base, p_local, p_padding, p_seed, p_out, p_lse,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, lk_b, lk_h, lk_l, lq_b, lq_h, lq_l,
    out_b, out_h, out_l, heads, height, width, skip, num_buckets, tiles, own_chunks, other_chunks,
    scale, threshold, keep_scale,
    HAS_K: tl.constexpr, HAS_Q: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    HAS_SKIP: tl.constexpr, TERMS: tl.constexpr, SEPARABLE: tl.constexpr,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_OWN: tl.constexpr, BLOCK_OTHER: tl.constexpr,
):  # fmt: skip
    """Compute `out` and `lse` of the own queries."""
    tokens = skip + height * width
    head, row, o_columns = own_columns(tiles, own_chunks, HAS_SKIP, BLOCK_OWN)
    o_q, m_q = row_tokens(row, o_columns, width, skip)
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    p_k += b * k_b + h * k_h
    p_v += b * v_b + h * v_h
    p_lk += b * lk_b + h * lk_h
    p_lq += b * lq_b + h * lq_h
    p_padding += b * tokens
    b_q = load_rows(p_q + b * q_b + h * q_h, q_l, o_q, m_q, DIM, BLOCK_DIM)
    if HAS_DROPOUT:
        b_key0, b_key1 = query_keys(p_seed, head, o_q)
    b_max = tl.full([BLOCK_OWN], float("-inf"), tl.float32)
    b_total = tl.zeros([BLOCK_OWN], tl.float32)
    b_out = tl.zeros([BLOCK_OWN, BLOCK_DIM], tl.float32)
    first = row * 0 - HAS_SKIP
    while first < height:
        end = run_end(p_row_base, row, first, height, TERMS, SEPARABLE, HAS_K or HAS_Q, BLOCK_ROWS)
        for chunk in range(other_chunks):
            o_others = chunk * BLOCK_OTHER + tl.arange(0, BLOCK_OTHER)
            _, _, b_back0, b_back1, b_bias = enter_run(
                p_row_base, p_local, p_lk, lk_l, row, first, o_q, m_q, o_columns, o_others,
                height, width, num_buckets, scale, HAS_K, HAS_Q, TERMS, SEPARABLE,
            )  # fmt: skip
            for other_row in range(first, end):
                o_k, m_k = row_tokens(other_row, o_others, width, skip)
                b_k = load_rows(p_k, k_l, o_k, m_k, DIM, BLOCK_DIM)
                b_logits = tile_logits(
                    b_q, b_k, b_bias, scale, p_row_base, p_lq, lq_l, row, other_row, o_k, m_k,
                    b_back0, b_back1, height, num_buckets, HAS_Q, TERMS,
                )  # fmt: skip
                b_v = load_rows(p_v, v_l, o_k, m_k, DIM, BLOCK_DIM)
                if HAS_PADDING:
                    m_k &= tl.load(p_padding + o_k, mask=m_k, other=1) == 0
                b_logits = tl.where(m_k[None, :], b_logits, float("-inf"))
                b_new_max = tl.maximum(b_max, tl.max(b_logits, 1))
                # The maximum is -inf until a query has met a key, and -inf - -inf would be NaN.
                b_shift = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
                b_decay = tl.exp2(b_max - b_shift)
                b_weights = tl.exp2(b_logits - b_shift[:, None])
                b_total = b_total * b_decay + tl.sum(b_weights, 1)
                b_max = b_new_max
                if HAS_DROPOUT:
                    m_keep = survives(b_key0[:, None], b_key1[:, None], o_k[None, :], threshold)
                    b_weights = tl.where(m_keep, b_weights * keep_scale, 0.0)
                b_out *= b_decay[:, None]
                b_out += tl.dot(b_weights.to(b_v.dtype), b_v, input_precision="ieee")
        first = end
    o_lse = head.to(tl.int64) * tokens + o_q
    b_out /= tl.where(b_total > 0, b_total, 1.0)[:, None]
    o_dim = tl.arange(0, BLOCK_DIM)
    p_out += b * out_b + h * out_h + o_q[:, None] * out_l + o_dim[None, :]
    tl.store(p_out, b_out, mask=m_q[:, None] & (o_dim < DIM)[None, :])
    tl.store(p_lse + o_lse, (b_max + tl.log2(b_total)) * LN2, mask=m_q)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend, with head dims up to 128 and no float64; see `rpe_ops.reference.lookup_forward`."""
    batch, heads, tokens, dim = q.shape
    tiles = choose_tiles(buckets, dim, q.dtype, backward=False)
    common = {
        **common_arguments(q, buckets, key_padding, seed, scale, dropout_p, tiles),
        **matrices(lk=q if lookup_k is None else lookup_k, lq=q if lookup_q is None else lookup_q),
        "HAS_K": lookup_k is not None,
        "HAS_Q": lookup_q is not None,
    }
    out = q.new_empty(batch, tokens, heads, dim).transpose(1, 2)
    lse = q.new_empty(batch, heads, tokens, dtype=torch.float32)
    with device_of(q):
        grid = (batch * heads * common["tiles"],)
        operands = matrices(q=q, k=k, v=v, out=out)
        assert operands["p_out"] is out, "the output of a head spans too much memory"
        _forward_kernel[grid](**operands, **common, p_lse=lse)
        sums = attention_sums(q, k, lse, buckets, common) if needs_sums else q.new_empty(0)
    return out, sums, lse
