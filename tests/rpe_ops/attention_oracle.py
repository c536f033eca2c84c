"""Fused attention from its equations, in float64, with whole L × L tensors.

The computation is independent of the operators: buckets are computed in loops over pairs of
positions, the vectors of every pair are selected by one-hot tensors, and autograd computes the
gradients. Notation: rpe_ops/README.md.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from irpe_core import RPEConfig
from rpe_ops.dropout import keep_mask
from tests.irpe_core.naive import buckets

__all__ = ["Results", "attend"]


class Results(NamedTuple):
    """Outputs and gradients, None for an absent input or output."""

    out: Tensor
    sums: Tensor | None
    lse: Tensor
    grad_q: Tensor
    grad_k: Tensor
    grad_v: Tensor
    grad_table_k: Tensor | None
    grad_table_q: Tensor | None
    grad_table_v: Tensor | None


@functools.lru_cache(maxsize=16)
def one_hot_buckets(config: RPEConfig, height: int, width: int) -> Tensor:
    """Return `(L, L, terms·K)`, 1 at the buckets of every pair."""
    terms = buckets(config, height, width)
    return torch.cat([one_hot(ids, config.num_buckets) for ids in terms], -1).double()


def attend(
    config: RPEConfig,
    height: int,
    width: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table_k: Tensor | None,
    table_q: Tensor | None,
    table_v: Tensor | None,
    key_padding: Tensor | None,
    seed: Tensor,
    scale: float,
    dropout_p: float,
    grad_out: Tensor,
) -> Results:
    """Compute the outputs and the gradients."""
    inputs = [
        None if x is None else x.detach().double().requires_grad_()
        for x in (q, k, v, table_k, table_q, table_v)
    ]
    q, k, v, table_k, table_q, table_v = inputs
    selected = one_hot_buckets(config, height, width).to(q.device)
    logits = scale * q @ k.transpose(-2, -1)
    if table_k is not None:
        logits = logits + _encoding(scale * q, table_k, selected)
    if table_q is not None:
        logits = logits + _encoding(scale * k, table_q, selected).transpose(-2, -1)
    if key_padding is not None:
        logits = logits.masked_fill(key_padding[:, None, None, :], float("-inf"))
    lse = logits.logsumexp(-1)
    weights = torch.where(lse[..., None] == float("-inf"), 0.0, logits.softmax(-1))
    if dropout_p > 0:
        weights = weights * keep_mask(seed, *weights.shape, dropout_p) / (1 - dropout_p)
    out, sums = weights @ v, None
    if table_v is not None:
        sums = torch.einsum("bhij,ijn->bhin", weights, selected).detach()
        of_heads = table_v.expand(q.shape[1], -1, -1)
        out = out + torch.einsum("bhij,ijn,hnd->bhid", weights, selected, of_heads)
    present = [x for x in inputs if x is not None]
    grads = iter(torch.autograd.grad((out * grad_out).sum(), present))
    grads = [None if x is None else next(grads) for x in inputs]
    return Results(out.detach(), sums, lse.detach(), *grads)


def _encoding(x: Tensor, table: Tensor, selected: Tensor) -> Tensor:
    """Return the encoding `(B, H, L, L)` of tokens `x`; a table of two dimensions is a bias."""
    table = table.expand(x.shape[1], *table.shape[1:])
    if table.ndim == 2:
        return torch.einsum("hn,ijn->hij", table, selected)
    return torch.einsum("bhid,hdn,ijn->bhij", x, table, selected)
