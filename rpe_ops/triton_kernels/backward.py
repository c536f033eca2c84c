"""Backward of fused attention: one kernel, launched for the queries and then for the keys.

    dA = dO vᵀ + dsums[i, bucket(i, j)],  dP = dropout(dA),  dS = P·(dP - delta)
    dq = scale·dS k,  dk = scale·dSᵀ q,  dv = Aᵀ dO,  dlookup = the bucket sums of dS or dSᵀ

`delta = dO·out + dsums·sums` is an argument, and P is recomputed from `lse` (Dao,
"FlashAttention-2", 2023). A program owns the tokens of one grid row and sums over all other tokens,
so no two programs write to the same place. In the launch for the queries, the own tokens have
`(x, y) = (q, dO)`, lookup_k and dsums, and the other tokens have `(k, v)` and lookup_q. In the
launch for the keys it is the reverse. Notation: rpe_ops/README.md.
"""

import triton
import triton.language as tl
from torch import Tensor

from rpe_ops.grid import GridBuckets
from rpe_ops.triton_kernels.dropout_mask import survives
from rpe_ops.triton_kernels.grid_tiles import (
    add_by_local,
    base_buckets,
    enter_run,
    finish_run,
    gather_terms,
    load_queries,
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
    sums_block,
)

__all__ = ["lookup_backward"]


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def _backward_kernel(
    p_x, p_y, p_ox, p_oy, p_own, p_other, p_gs, p_row_base, p_local, p_padding, p_seed,
    p_lse, p_delta, p_dx, p_dy, p_sums,
    x_b, x_h, x_l, y_b, y_h, y_l, ox_b, ox_h, ox_l, oy_b, oy_h, oy_l,
    own_b, own_h, own_l, other_b, other_h, other_l, gs_b, gs_h, gs_l, dx_b, dx_h, dx_l,
    heads, height, width, skip, num_buckets, run_width, tiles, own_chunks, other_chunks,
    scale, threshold, keep_scale,
    FROM_KEYS: tl.constexpr, HAS_OWN: tl.constexpr, HAS_OTHER: tl.constexpr,
    HAS_SUMS: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    HAS_SKIP: tl.constexpr, TERMS: tl.constexpr, SEPARABLE: tl.constexpr,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_OWN: tl.constexpr, BLOCK_OTHER: tl.constexpr, BLOCK_SUMS: tl.constexpr,
):  # fmt: skip
    """Compute dx, dy and the gradients of the lookups of the own tokens."""
    HAS_BUCKETS: tl.constexpr = HAS_OWN or HAS_OTHER or HAS_SUMS
    WAY_BACK: tl.constexpr = HAS_OTHER or (HAS_SUMS and FROM_KEYS)
    tokens = skip + height * width
    head, row, o_columns = own_columns(tiles, own_chunks, HAS_SKIP, BLOCK_OWN)
    o_own, m_own = row_tokens(row, o_columns, width, skip)
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    p_ox += b * ox_b + h * ox_h
    p_oy += b * oy_b + h * oy_h
    p_own += b * own_b + h * own_h
    p_other += b * other_b + h * other_h
    p_gs += b * gs_b + h * gs_h
    p_padding += b * tokens
    p_lse += head.to(tl.int64) * tokens
    p_delta += head.to(tl.int64) * tokens
    b_x = load_rows(p_x + b * x_b + h * x_h, x_l, o_own, m_own, DIM, BLOCK_DIM)
    b_y = load_rows(p_y + b * y_b + h * y_h, y_l, o_own, m_own, DIM, BLOCK_DIM)
    if not FROM_KEYS:
        b_lse, b_delta, b_key0, b_key1 = load_queries(
            p_lse, p_delta, p_seed, head, o_own, m_own, HAS_DROPOUT
        )
        b_lse, b_delta = b_lse[:, None], b_delta[:, None]
        b_key0, b_key1 = b_key0[:, None], b_key1[:, None]
    b_dx = tl.zeros([BLOCK_OWN, BLOCK_DIM], tl.float32)
    b_dy = b_dx
    p_sums += (head.to(tl.int64) * tokens + o_own) * (TERMS * num_buckets)
    b_sums1 = tl.zeros([BLOCK_OWN, BLOCK_SUMS], tl.float32)
    b_sums0 = tl.zeros([BLOCK_OWN, 16 if TERMS == 2 else BLOCK_SUMS], tl.float32)
    first = row * 0 - HAS_SKIP
    while first < height:
        end = run_end(p_row_base, row, first, height, TERMS, SEPARABLE, HAS_BUCKETS, BLOCK_ROWS)
        for chunk in range(other_chunks):
            o_others = chunk * BLOCK_OTHER + tl.arange(0, BLOCK_OTHER)
            b_local0, b_local1, b_back0, b_back1, b_bias = enter_run(
                p_row_base, p_local, p_own, own_l, row, first, o_own, m_own, o_columns, o_others,
                height, width, num_buckets, scale, HAS_OWN, WAY_BACK, TERMS, SEPARABLE,
            )  # fmt: skip
            b_gs = tl.zeros([BLOCK_OWN, BLOCK_OTHER], tl.float32)
            if HAS_SUMS and not FROM_KEYS:
                base0, base1 = base_buckets(p_row_base, row, first, height, num_buckets, TERMS)
                b_gs = gather_terms(
                    p_gs, gs_l, o_own[:, None], m_own[:, None], base0, base1, b_local0, b_local1,
                    num_buckets, TERMS,
                )  # fmt: skip
            b_run = tl.zeros([BLOCK_OWN, BLOCK_OTHER], tl.float32)
            for other_row in range(first, end):
                o_other, m_other = row_tokens(other_row, o_others, width, skip)
                b_ox = load_rows(p_ox, ox_l, o_other, m_other, DIM, BLOCK_DIM)
                b_oy = load_rows(p_oy, oy_l, o_other, m_other, DIM, BLOCK_DIM)
                b_logits = tile_logits(
                    b_x, b_ox, b_bias, scale, p_row_base, p_other, other_l, row, other_row, o_other,
                    m_other, b_back0, b_back1, height, num_buckets, HAS_OTHER, TERMS,
                )  # fmt: skip
                if FROM_KEYS:
                    o_keys, m_keys = o_own[:, None], m_own[:, None]
                    b_lse, b_delta, b_key0, b_key1 = load_queries(
                        p_lse, p_delta, p_seed, head, o_other, m_other, HAS_DROPOUT
                    )
                    b_lse, b_delta = b_lse[None, :], b_delta[None, :]
                    b_key0, b_key1 = b_key0[None, :], b_key1[None, :]
                else:
                    o_keys, m_keys = o_other[None, :], m_other[None, :]
                if HAS_SUMS and FROM_KEYS:
                    base0, base1 = base_buckets(
                        p_row_base, other_row, row, height, num_buckets, TERMS
                    )
                    b_gs = gather_terms(
                        p_gs, gs_l, o_other[None, :], m_other[None, :], base0, base1, b_back0,
                        b_back1, num_buckets, TERMS,
                    )  # fmt: skip
                b_dweights = tl.dot(b_y, tl.trans(b_oy), b_gs, input_precision="ieee")
                if HAS_PADDING:
                    m_keys &= tl.load(p_padding + o_keys, mask=m_keys, other=1) == 0
                b_weights = tl.exp2(tl.where(m_keys, b_logits, float("-inf")) - b_lse)
                b_kept = b_weights
                if HAS_DROPOUT:
                    m_keep = survives(b_key0, b_key1, o_keys, threshold)
                    b_dweights = tl.where(m_keep, b_dweights * keep_scale, 0.0)
                    b_kept = tl.where(m_keep, b_weights * keep_scale, 0.0)
                if FROM_KEYS:
                    b_dy += tl.dot(b_kept.to(b_oy.dtype), b_oy, input_precision="ieee")
                b_dlogits = b_weights * (b_dweights - b_delta)
                b_dx += tl.dot(b_dlogits.to(b_ox.dtype), b_ox, input_precision="ieee")
                b_run += b_dlogits
            if HAS_OWN:
                b_sums0 = add_by_local(b_sums0, b_run, b_local0)
                if TERMS == 2:
                    b_sums1 = add_by_local(b_sums1, b_run, b_local1)
        if HAS_OWN:
            b_sums0, b_sums1 = finish_run(
                p_sums, b_sums0, b_sums1, m_own, p_row_base, row, first, end, height, num_buckets,
                run_width, TERMS,
            )  # fmt: skip
        first = end
    o_dim = tl.arange(0, BLOCK_DIM)
    # Both gradients have the same strides.
    offsets = b * dx_b + h * dx_h + o_own[:, None] * dx_l + o_dim[None, :]
    m_rows = m_own[:, None] & (o_dim < DIM)[None, :]
    tl.store(p_dx + offsets, b_dx * scale, mask=m_rows)
    if FROM_KEYS:
        tl.store(p_dy + offsets, b_dy, mask=m_rows)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Compute the gradients of q, k, v and the lookups; see `rpe_ops.reference.lookup_backward`."""
    batch, heads, tokens, dim = q.shape
    grad_q, grad_k, grad_v = (
        q.new_empty(batch, tokens, heads, dim).transpose(1, 2) for _ in range(3)
    )
    grad_lookup_k, grad_lookup_q = (
        None if lookup is None else q.new_zeros(lookup.shape) for lookup in (lookup_k, lookup_q)
    )
    tiles = choose_tiles(buckets, q.shape[-1], q.dtype, backward=True)
    common = common_arguments(q, buckets, key_padding, seed, scale, dropout_p, tiles)
    common |= {
        **matrices(gs=q if grad_sums is None else grad_sums),
        "HAS_SUMS": grad_sums is not None,
        "p_lse": lse,
        "p_delta": delta,
        "run_width": buckets.run_width,
        "BLOCK_SUMS": sums_block(buckets),
    }
    from_queries = {
        **matrices(x=q, y=grad_out, ox=k, oy=v, dx=grad_q),
        **_lookups(q, lookup_k, lookup_q, grad_lookup_k),
        "p_dy": grad_q,
        "FROM_KEYS": False,
    }
    from_keys = {
        **matrices(x=k, y=v, ox=q, oy=grad_out, dx=grad_k),
        **_lookups(q, lookup_q, lookup_k, grad_lookup_q),
        "p_dy": grad_v,
        "FROM_KEYS": True,
    }
    for operands, grad in ((from_queries, grad_q), (from_keys, grad_k)):
        assert operands["p_dx"] is grad, "the gradient of a head spans too much memory"
    grid = (batch * heads * common["tiles"],)
    with device_of(q):
        _backward_kernel[grid](**from_queries, **common)
        _backward_kernel[grid](**from_keys, **common)
    return grad_q, grad_k, grad_v, grad_lookup_k, grad_lookup_q


def _lookups(q: Tensor, own: Tensor | None, other: Tensor | None, grad_own: Tensor | None) -> dict:
    """Return the arguments for the lookups of own and other tokens; absent ones are `q`."""
    return {
        **matrices(own=q if own is None else own, other=q if other is None else other),
        "p_sums": q if own is None else grad_own,
        "HAS_OWN": own is not None,
        "HAS_OTHER": other is not None,
    }
