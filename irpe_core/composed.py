"""Attention composed of torch's operators, with encodings as L × L tensors.

The encodings of the logits are added to torch's attention as a bias. With rpe_v, which needs the
attention weights, softmax and products are computed step by step. `irpe_core.functional` has the
equations.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from irpe_core.tracing import is_recording

__all__ = ["add_mask", "attention_weights", "composed_attention", "logit_bias"]


def composed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    encodings: tuple[nn.Module | None, ...],
    grid: tuple[int | None, int | None],
    attn_mask: Tensor | None,
    dropout_p: float,
    scale: float,
) -> Tensor:
    """Attend; arguments, output and errors are those of `irpe_core.rpe_attention`.

    `encodings` are `rpe_q`, `rpe_k` and `rpe_v`, and `grid` is height and width.
    """
    rpe_q, rpe_k, rpe_v = encodings
    bias = logit_bias(q, k, rpe_q, rpe_k, grid, scale)
    bias = add_mask(bias, attn_mask, q.dtype)
    # On the CPU, torch's attention has no fused kernel with the gradient of a bias. Its fallback
    # checks every row for masks, which is slower than the steps below. Exporters to ONNX change the
    # memory order of its result, which the following reshape then cannot view.
    with_torch = not is_recording() and (q.is_cuda or not torch.is_grad_enabled())
    if rpe_v is None and with_torch:
        return F.scaled_dot_product_attention(q, k, v, bias, dropout_p, scale=scale)
    attn_BHQK = attention_weights(q * scale, k, bias, has_mask=attn_mask is not None)
    if dropout_p > 0:
        attn_BHQK = F.dropout(attn_BHQK, dropout_p)
    out = attn_BHQK @ v
    return out if rpe_v is None else out + rpe_v(attn_BHQK, *grid)


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
    if attn.requires_grad or is_recording():
        # The backward pass of softmax needs its output, which must not be overwritten then.
        return attn.masked_fill(nowhere, 0.0)
    return attn.masked_fill_(nowhere, 0.0)
