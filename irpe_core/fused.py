"""Attention with encodings as one fused operator, `rpe_ops.attention`.

Its memory for pairs of tokens is bounded. It needs encodings with the same buckets, and no mask but
one of keys. Equations: `irpe_core.functional`.
"""

import torch
from torch import Tensor, nn

import rpe_ops
from irpe_core.buckets import BUCKET_CACHE
from irpe_core.encoding import resolve_grid
from irpe_core.tracing import is_recording

__all__ = ["can_fuse", "first_encoding", "fused_attention", "fused_implementation", "input_dtype"]


def fused_implementation(choice: str, device: torch.device) -> str | None:
    """Return the implementation of fused attention, or None to compose attention."""
    # "cuda" has no fused attention, and the fused reference exists only to test the others.
    if choice in ("cuda", "reference") or is_recording():
        return None
    chosen = rpe_ops.resolve(choice, device, "attention")
    return None if chosen == "reference" else chosen


def can_fuse(
    implementation: str,
    q: Tensor,
    encodings: tuple[nn.Module | None, ...],
    attn_mask: Tensor | None,
) -> bool:
    """Return whether the fused operator computes attention with these inputs."""
    return (
        not rpe_ops.reason_against_input(implementation, q)
        and _is_key_padding(attn_mask, q)
        and _share_buckets(encodings)
    )


def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    encodings: tuple[nn.Module | None, ...],
    grid: tuple[int | None, int | None],
    attn_mask: Tensor | None,
    dropout_p: float,
    scale: float,
    implementation: str,
) -> Tensor:
    """Attend; arguments, output and errors are those of `irpe_core.rpe_attention`.

    `encodings` are `rpe_q`, `rpe_k` and `rpe_v`, `grid` is height and width, and `implementation`
    is one of `rpe_ops.attention`.
    """
    if q.dtype != (dtype := input_dtype(q)):
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    config = first_encoding(encodings).config
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
        key_padding=None if attn_mask is None else ~attn_mask[:, 0, 0],
        dropout_p=dropout_p,
        scale=scale,
        implementation=implementation,
    )


def input_dtype(q: Tensor) -> torch.dtype:
    """Return the dtype in which attention is computed; autocast treats torch's attention alike."""
    if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
        return torch.get_autocast_dtype(q.device.type)
    return q.dtype


def first_encoding(encodings: tuple[nn.Module | None, ...]) -> nn.Module:
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
