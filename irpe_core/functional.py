"""Scaled dot-product attention with relative position encoding.

    logits = q kᵀ·scale + rpe_k(q·scale) + rpe_q(k·scale)ᵀ + mask
    out    = a v + rpe_v(a),    a = dropout(softmax(logits))

Source: iRPE (Wu et al., ICCV 2021). Without encodings this is
`torch.nn.functional.scaled_dot_product_attention`, and it keeps that function's conventions: a
boolean mask is True where attention is allowed, and a query that may attend nowhere yields zeros.

Where an implementation of `rpe_ops.attention` runs on the device, everything is one operator that
holds nothing of size L × L. Elsewhere, for masks of single pairs, and for encodings whose buckets
differ, they are written out and added: to torch's attention as a bias, or where rpe_v needs the
weights, step by step.
"""

import logging

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rpe_ops
from irpe_core.buckets import BUCKET_CACHE
from irpe_core.encoding import resolve_grid

__all__ = ["rpe_attention", "set_implementation"]

logger = logging.getLogger(__name__)


def set_implementation(module: nn.Module, implementation: str, device: torch.device | str) -> str:
    """Choose the operators of all encodings in `module`.

    Args:
        module: Holds encodings from `build_rpe`.
        implementation: `"auto"` or a name in `rpe_ops.IMPLEMENTATIONS`.
        device: Where the module is going to run.

    Returns:
        What will run, and why attention is not fused where it is not; it is logged, too.

    Raises:
        ValueError: The name is unknown.
        rpe_ops.ImplementationError: An explicit choice that cannot run on the device; says why.
    """
    device = torch.device(device)
    gather = rpe_ops.resolve(implementation, device)
    encodings = [m for m in module.modules() if hasattr(m, "implementation")]
    for encoding in encodings:
        encoding.implementation = implementation
    operators = _describe(implementation, device, gather) if encodings else "none in this model"
    logger.info("position encodings: %s", operators)
    return operators


def _describe(implementation: str, device: torch.device, gather: str) -> str:
    fused = _fused_implementation(implementation, device)
    if fused is not None:
        return f"fused attention by {fused}"
    reasons = rpe_ops.available_implementations(device, "attention")
    against = "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason)
    chosen = f"chosen: {implementation}" if implementation != "auto" else against
    return f"gather by {gather}, attention not fused ({chosen})"


def _fused_implementation(choice: str, device: torch.device) -> str | None:
    """The implementation of fused attention to take, None for none."""
    # Those two have operators to compose attention of, and the reference of attention is an oracle.
    if choice in ("cuda", "reference"):
        return None
    chosen = rpe_ops.resolve(choice, device, "attention")
    return None if chosen == "reference" else chosen


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
        ValueError: The tokens do not form the grid, queries and keys differ in number, the scale is
            0, or the mask is neither boolean nor floating point.
    """
    if rpe_q is None and rpe_k is None and rpe_v is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, scale=scale)
    if q.shape[-2] != k.shape[-2]:
        raise ValueError(
            "queries and keys must be the same tokens for relative positions, "
            f"got {q.shape[-2]} queries and {k.shape[-2]} keys"
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if scale == 0:
        raise ValueError("scale must not be 0")
    encodings = rpe_q, rpe_k, rpe_v
    fused = _fused_implementation(_first(encodings).implementation, q.device)
    takes = fused is not None and not rpe_ops.reason_against_input(fused, q)
    if takes and _is_key_padding(attn_mask, q) and _share_buckets(encodings):
        return _fused_attention(
            q, k, v, encodings, (height, width), attn_mask, dropout_p, scale, fused
        )
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


def _first(encodings: tuple[nn.Module | None, ...]) -> nn.Module:
    return next(encoding for encoding in encodings if encoding is not None)


def _share_buckets(encodings: tuple[nn.Module | None, ...]) -> bool:
    """Whether all encodings have the same buckets and operators; else each goes its own way."""
    kinds = {
        (e.config.method, e.config.ratio, e.config.skip, e.implementation)
        for e in encodings
        if e is not None
    }
    return len(kinds) == 1


def _is_key_padding(mask: Tensor | None, q: Tensor) -> bool:
    """Whether there is no mask, or a boolean one of keys alone, `(B, 1, 1, L)`."""
    if mask is None:
        return True
    return mask.dtype == torch.bool and mask.shape == (q.shape[0], 1, 1, q.shape[2])


def _fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    encodings: tuple[nn.Module | None, ...],
    hw: tuple[int | None, int | None],
    allowed: Tensor | None,
    dropout_p: float,
    scale: float,
    implementation: str,
) -> Tensor:
    if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
        # As autocast does with torch's attention.
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    config = _first(encodings).config
    grid = resolve_grid(q.shape[-2], config.skip, *hw)
    table_q, table_k, table_v = (
        None if encoding is None else encoding.table().to(q.dtype) for encoding in encodings
    )
    return rpe_ops.attention(
        q,
        k,
        v,
        BUCKET_CACHE.grid(config, *grid, like=q),
        table_k=table_k,
        table_q=table_q,
        table_v=table_v,
        key_padding=None if allowed is None else ~allowed[:, 0, 0],
        dropout_p=dropout_p,
        scale=scale,
        implementation=implementation,
    )


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
