"""Fused attention as its equations say it, in float64, with whole L × L tensors.

Independent of the operators: buckets come from loops over pairs of positions, lookups and sums go
through one-hot tensors, gradients through autograd.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from irpe_core import RPEConfig
from rpe_ops.dropout import keep_mask
from tests.irpe_core.naive import buckets

__all__ = ["Results", "attend", "one_hot_buckets"]


class Results(NamedTuple):
    """Outputs and gradients, None where there is no such input or output."""

    out: Tensor
    sums: Tensor | None
    lse: Tensor
    grad_q: Tensor
    grad_k: Tensor
    grad_v: Tensor
    grad_lookup_k: Tensor | None
    grad_lookup_q: Tensor | None


@functools.lru_cache(maxsize=16)
def one_hot_buckets(config: RPEConfig, height: int, width: int) -> Tensor:
    """`(L, L, T·K)`: 1 at the buckets of every pair."""
    tables = buckets(config, height, width)
    return torch.cat([one_hot(table, config.num_buckets) for table in tables], -1).double()


def attend(
    config: RPEConfig,
    height: int,
    width: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lookup_k: Tensor | None,
    lookup_q: Tensor | None,
    key_padding: Tensor | None,
    seed: Tensor,
    scale: float,
    dropout_p: float,
    grad_out: Tensor,
    grad_sums: Tensor | None,
) -> Results:
    """Forward and backward; sums are made where `grad_sums` is given."""
    inputs = [
        None if x is None else x.detach().double().requires_grad_()
        for x in (q, k, v, lookup_k, lookup_q)
    ]
    q, k, v, lookup_k, lookup_q = inputs
    index = one_hot_buckets(config, height, width)
    logits = scale * q @ k.transpose(-2, -1)
    if lookup_k is not None:
        logits = logits + torch.einsum("bhin,ijn->bhij", lookup_k, index)
    if lookup_q is not None:
        logits = logits + torch.einsum("bhjn,jin->bhij", lookup_q, index)
    if key_padding is not None:
        logits = logits.masked_fill(key_padding[:, None, None, :], float("-inf"))
    lse = logits.logsumexp(-1)
    weights = torch.where(lse[..., None] == float("-inf"), 0.0, logits.softmax(-1))
    if dropout_p > 0:
        weights = weights * keep_mask(seed, *weights.shape, dropout_p) / (1 - dropout_p)
    out = weights @ v
    loss, sums = (out * grad_out).sum(), None
    if grad_sums is not None:
        sums = torch.einsum("bhij,ijn->bhin", weights, index)
        loss = loss + (sums * grad_sums).sum()
    present = [x for x in inputs if x is not None]
    grads = iter(torch.autograd.grad(loss, present))
    grads = [None if x is None else next(grads) for x in inputs]
    return Results(out.detach(), None if sums is None else sums.detach(), lse.detach(), *grads)
