"""The encodings and their attention, written as the equations: loops, dense gathers, float64.

The code is independent of `irpe_core`: bucket ids come from Python loops over pairs of positions,
and every encoding gathers `T[h, :, bucket(i, j)]` for all pairs into an L × L × d tensor.

Source: iRPE (Wu et al., ICCV 2021).
"""

import math

import numpy as np
import torch
from torch import Tensor, nn

from irpe_core import RPEConfig

__all__ = ["piecewise", "buckets", "tables_of", "logit_bias", "attention"]


def piecewise(x: float, alpha: float, beta: float, gamma: float) -> int:
    """Return g(x) of one number, in float32, rounded half to even."""
    x = np.float32(x)
    distance = np.abs(x)
    if distance <= alpha:
        return int(np.round(x))
    growth = np.log(distance / np.float32(alpha)) / np.float32(math.log(gamma / alpha))
    far = np.round(np.float32(alpha) + growth * np.float32(beta - alpha))
    return int(np.sign(x)) * int(min(beta, far))


def buckets(config: RPEConfig, height: int, width: int) -> list[Tensor]:
    """Return the bucket ids of every pair of tokens; for `cross` those of rows and columns."""

    def g(x: float) -> int:
        return piecewise(x, config.ratio, 2 * config.ratio, 8 * config.ratio)

    bound = int(2 * config.ratio)
    side = 2 * bound + 1
    of_offset = {
        "euc": [lambda dr, dc: g(round(math.sqrt(dr * dr + dc * dc))) + bound],
        "quant": [lambda dr, dc: g(dr * dr + dc * dc) + bound],
        "product": [lambda dr, dc: (g(dr) + bound) * side + g(dc) + bound],
        "cross": [lambda dr, dc: g(dr) + bound, lambda dr, dc: g(dc) + bound],
    }[config.method]
    extra = side * side if config.method == "product" else side
    positions = [(row, col) for row in range(height) for col in range(width)]
    length = config.skip + len(positions)
    terms = []
    for bucket in of_offset:
        ids = torch.full((length, length), extra)
        for i, (row_i, col_i) in enumerate(positions):
            for j, (row_j, col_j) in enumerate(positions):
                ids[config.skip + i, config.skip + j] = bucket(row_i - row_j, col_i - col_j)
        terms.append(ids)
    return terms


def tables_of(rpe: nn.Module | None, heads: int) -> list[Tensor]:
    """Return the tables of an encoding in float64, one per head, rows before columns."""
    if rpe is None:
        return []
    parts = [rpe.rp_rows, rpe.rp_cols] if hasattr(rpe, "rp_rows") else [rpe]
    tables = [next(part.parameters()).double() for part in parts]
    return [table.expand(heads, *table.shape[1:]) for table in tables]


def logit_bias(x: Tensor, tables: list[Tensor], ids: list[Tensor], mode: str) -> Tensor:
    """Compute `r[b,h,i,j] = x[b,h,i,:] · T[h,:,bucket(i,j)]`, or `T[h,bucket(i,j)]` for bias."""
    total = torch.zeros((), dtype=torch.float64)
    for table, index in zip(tables, ids, strict=True):
        if mode == "bias":
            total = total + table[:, index]
        else:
            total = total + torch.einsum("bhid,hdij->bhij", x, table[:, :, index])
    return total


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpe_q: nn.Module | None,
    rpe_k: nn.Module | None,
    rpe_v: nn.Module | None,
    config: RPEConfig,
    grid: tuple[int, int],
    *,
    attn_mask: Tensor | None = None,
    dropout_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attend in float64; the output of a query that may attend nowhere is zero.

    logits = q kᵀ·scale + rpe_k(q·scale) + rpe_q(k·scale)ᵀ + mask
    out    = a v + rpe_v(a),    a = softmax(logits)·dropout_mask
    """
    ids = buckets(config, *grid)
    heads = q.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = q.double() * scale, k.double(), v.double()
    logits = torch.einsum("bhid,bhjd->bhij", q, k)
    if rpe_k is not None:
        logits = logits + logit_bias(q, tables_of(rpe_k, heads), ids, config.mode)
    if rpe_q is not None:
        on_q = logit_bias(k * scale, tables_of(rpe_q, heads), ids, config.mode)
        logits = logits + on_q.transpose(-2, -1)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            logits = torch.where(attn_mask, logits, -math.inf)
        else:
            logits = logits + attn_mask.double()
    nowhere = (logits == -math.inf).all(-1, keepdim=True)
    attn = torch.where(nowhere, 0.0, torch.where(nowhere, 0.0, logits).softmax(-1))
    if dropout_mask is not None:
        attn = attn * dropout_mask
    out = torch.einsum("bhij,bhjd->bhid", attn, v)
    for table, index in zip(tables_of(rpe_v, heads), ids, strict=False):
        out = out + torch.einsum("bhij,hijd->bhid", attn, table[:, index])
    return out
