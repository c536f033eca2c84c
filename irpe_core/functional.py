"""Scaled dot-product attention with relative position encoding.

    logits = q kᵀ·scale + rpe_k(q·scale) + rpe_q(k·scale)ᵀ + mask
    out    = a v + rpe_v(a),    a = dropout(softmax(logits))

Source: iRPE (Wu et al., ICCV 2021). Without encodings this is
`torch.nn.functional.scaled_dot_product_attention`. The conventions are the same: a boolean mask is
True where attention is allowed, and the output of a query that may attend nowhere is zero.

There are two ways to compute it. If an implementation of `rpe_ops.attention` runs on the device,
attention is one fused operator, whose memory for pairs of tokens is bounded. Otherwise, and also
with a mask of single pairs or with encodings of different methods or ratios, attention is composed:
the encodings are L × L tensors that are added to torch's attention as a bias. With rpe_v, which
needs the attention weights, softmax and products are computed step by step.
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
    """Choose the implementation of all encodings in `module`.

    Args:
        module: A module that contains encodings from `build_rpe`.
        implementation: `"auto"` or a name in `rpe_ops.IMPLEMENTATIONS`.
        device: Device on which the module will run.

    Returns:
        A description of the operators that will run, with the reason if attention is not fused.
        It is also logged.

    Raises:
        ValueError: The name is unknown.
        rpe_ops.ImplementationError: The named implementation cannot run on the device.
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
    """Describe the operators that will run for a choice of the implementation."""
    fused = _fused_implementation(implementation, device)
    if fused is not None:
        return f"fused attention by {fused}"
    reasons = rpe_ops.available_implementations(device, "attention")
    against = "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason)
    chosen = f"chosen: {implementation}" if implementation != "auto" else against
    return f"gather by {gather}, attention not fused ({chosen})"


def _fused_implementation(choice: str, device: torch.device) -> str | None:
    """Return the implementation of fused attention, or None to compose attention."""
    # "cuda" has no fused attention, and the fused reference exists only to test the others.
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
        rpe_q: Encoding from `build_rpe`, computed from the keys.
        rpe_k: Encoding from `build_rpe`, computed from the queries.
        rpe_v: Encoding from `build_rpe`, computed from the attention weights.
        height: Rows of the grid.
        width: Columns of the grid. If both are None, the tokens must form a square.
        attn_mask: Mask that can be broadcast to `(B, H, L, L)`: boolean, True where attention is
            allowed, or floating point, added to the logits with the encodings.
        dropout_p: Probability of dropping an attention weight; 0 for evaluation.
        scale: Factor on the queries (on the keys for `rpe_q`); default `d**-0.5`.

    Returns:
        The output `(B, H, L, d)`.

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
        raise ValueError(f"scale must not be 0, got {scale!r}")
    encodings = rpe_q, rpe_k, rpe_v
    fused = _fused_implementation(_first(encodings).implementation, q.device)
    can_fuse = fused is not None and not rpe_ops.reason_against_input(fused, q)
    if can_fuse and _is_key_padding(attn_mask, q) and _share_buckets(encodings):
        return _fused_attention(
            q, k, v, encodings, (height, width), attn_mask, dropout_p, scale, fused
        )
    bias = logit_bias(q, k, rpe_q, rpe_k, (height, width), scale)
    bias = add_mask(bias, attn_mask, q.dtype)
    # On the CPU, torch's attention has no fused kernel with the gradient of a bias. Its fallback
    # checks every row for masks, which is slower than the steps below.
    if rpe_v is None and (q.is_cuda or not torch.is_grad_enabled()):
        return F.scaled_dot_product_attention(q, k, v, bias, dropout_p, scale=scale)
    attn_BHQK = attention_weights(q * scale, k, bias, has_mask=attn_mask is not None)
    if dropout_p > 0:
        attn_BHQK = F.dropout(attn_BHQK, dropout_p)
    out = attn_BHQK @ v
    return out if rpe_v is None else out + rpe_v(attn_BHQK, height, width)


def _first(encodings: tuple[nn.Module | None, ...]) -> nn.Module:
    """Return the first encoding that is not None."""
    return next(encoding for encoding in encodings if encoding is not None)


def _share_buckets(encodings: tuple[nn.Module | None, ...]) -> bool:
    """Return whether all encodings have the same buckets and the same implementation."""
    kinds = {
        (e.config.method, e.config.ratio, e.config.skip, e.implementation)
        for e in encodings
        if e is not None
    }
    return len(kinds) == 1


def _is_key_padding(mask: Tensor | None, q: Tensor) -> bool:
    """Return whether the mask is None, or a boolean mask of keys, `(B, 1, 1, L)`."""
    if mask is None:
        return True
    return mask.dtype == torch.bool and mask.shape == (q.shape[0], 1, 1, q.shape[2])


def _fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    encodings: tuple[nn.Module | None, ...],
    grid: tuple[int | None, int | None],
    allowed: Tensor | None,
    dropout_p: float,
    scale: float,
    implementation: str,
) -> Tensor:
    """Compute attention with encodings by the fused operator."""
    if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
        # Autocast treats torch's attention in the same way.
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    config = _first(encodings).config
    height, width = resolve_grid(q.shape[-2], config.skip, *grid)
    table_q, table_k, table_v = (
        None if encoding is None else encoding.table().to(q.dtype) for encoding in encodings
    )
    return rpe_ops.attention(
        q,
        k,
        v,
        BUCKET_CACHE.grid(config, height, width, like=q),
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
    grid: tuple[int | None, int | None],
    scale: float,
) -> Tensor | None:
    """Sum the encodings of the logits; the result can be broadcast to `(B, H, L, L)`."""
    bias = None if rpe_k is None else rpe_k(q * scale, *grid)
    if rpe_q is not None:
        on_q = rpe_q(k * scale, *grid).transpose(-2, -1)
        bias = on_q if bias is None else bias + on_q
    return bias


def add_mask(bias: Tensor | None, mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Combine encodings and mask into one additive bias of the given dtype."""
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
    """Compute `softmax(q kᵀ + bias)`; rows that may attend nowhere are zero."""
    logits = q @ k.transpose(-2, -1)
    if bias is not None:
        logits += bias
    if not has_mask:
        return logits.softmax(-1)
    nowhere = torch.isneginf(logits).all(-1, keepdim=True)
    attn = logits.masked_fill_(nowhere, 0.0).softmax(-1)
    # The backward pass of softmax needs its output, which must not be overwritten then.
    return attn.masked_fill(nowhere, 0.0) if attn.requires_grad else attn.masked_fill_(nowhere, 0.0)
