"""Scaled dot-product attention with relative position encoding.

    logits = q kᵀ·scale + rpe_k(q·scale) + rpe_q(k·scale)ᵀ + mask
    out    = a v + rpe_v(a),    a = dropout(softmax(logits))

Source: iRPE (Wu et al., ICCV 2021). Without encodings this is
`torch.nn.functional.scaled_dot_product_attention`, and it keeps that function's conventions: a
boolean mask is True where attention is allowed, and a query that may attend nowhere yields zeros.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["rpe_attention"]


def rpe_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpe_q: nn.Module | None = None,
    rpe_k: nn.Module | None = None,
    rpe_v: nn.Module | None = None,
    *,
    height: int | None = None,
    width: int | None = None,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """Attend with relative position encodings on any of queries, keys and values.

    Args:
        q: Queries `(B, H, L, d)`, not yet scaled.
        k: Keys `(B, H, L, d)`.
        v: Values `(B, H, L, d)`.
        rpe_q: Encoding that reads the keys, from `build_rpe`.
        rpe_k: Encoding that reads the queries.
        rpe_v: Encoding that reads the attention weights.
        height: Rows of the grid; with `width` None, the tokens must form a square.
        width: Columns of the grid.
        attn_mask: Broadcastable to `(B, H, L, L)`; boolean, True where attention is allowed, or
            floating point, added to the logits after the encodings.
        dropout_p: Probability of dropping an attention weight; 0 for evaluation.
        scale: Factor on the queries, default `d**-0.5`.

    Returns:
        `(B, H, L, d)`.

    Raises:
        ValueError: The tokens do not form the grid, queries and keys differ in number, or the mask
            is neither boolean nor floating point.
    """
    if rpe_q is None and rpe_k is None and rpe_v is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, scale=scale)
    if q.shape[-2] != k.shape[-2]:
        raise ValueError(
            "queries and keys must be the same tokens for relative positions, "
            f"got {q.shape[-2]} queries and {k.shape[-2]} keys"
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    bias = logit_bias(q, k, rpe_q, rpe_k, height, width, scale)
    bias = add_mask(bias, attn_mask, q.dtype)
    # On the CPU torch's attention has no kernel with the gradient of a bias, and the composition it
    # falls back to checks every row for masks.
    if rpe_v is None and (q.is_cuda or not torch.is_grad_enabled()):
        return F.scaled_dot_product_attention(q, k, v, bias, dropout_p, scale=scale)
    attn_BHQK = attention_weights(q * scale, k, bias, has_mask=attn_mask is not None)
    if dropout_p > 0:
        attn_BHQK = F.dropout(attn_BHQK, dropout_p)
    out = attn_BHQK @ v
    return out if rpe_v is None else out + rpe_v(attn_BHQK, height, width)


def logit_bias(
    q: Tensor,
    k: Tensor,
    rpe_q: nn.Module | None,
    rpe_k: nn.Module | None,
    height: int | None,
    width: int | None,
    scale: float,
) -> Tensor | None:
    """Sum of the encodings of the logits, broadcastable to `(B, H, L, L)`."""
    bias = None if rpe_k is None else rpe_k(q * scale, height, width)
    if rpe_q is not None:
        on_q = rpe_q(k * scale, height, width).transpose(-2, -1)
        bias = on_q if bias is None else bias + on_q
    return bias


def add_mask(bias: Tensor | None, mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Encodings and mask as one additive bias in the queries' dtype."""
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))
    elif mask is not None and not mask.is_floating_point():
        raise ValueError(f"attn_mask must be boolean or floating point, got {mask.dtype}")
    if bias is None or mask is None:
        total = mask if bias is None else bias
    else:
        total = bias + mask
    return None if total is None else total.to(dtype)


def attention_weights(q: Tensor, k: Tensor, bias: Tensor | None, *, has_mask: bool) -> Tensor:
    """`softmax(q kᵀ + bias)`; rows that may attend nowhere are zero, as in torch's attention."""
    logits = q @ k.transpose(-2, -1)
    if bias is not None:
        logits += bias
    if not has_mask:
        return logits.softmax(-1)
    nowhere = torch.isneginf(logits).all(-1, keepdim=True)
    attn = logits.masked_fill_(nowhere, 0.0).softmax(-1)
    # Softmax keeps its output for the backward pass: only without one may it be overwritten.
    return attn.masked_fill(nowhere, 0.0) if attn.requires_grad else attn.masked_fill_(nowhere, 0.0)
