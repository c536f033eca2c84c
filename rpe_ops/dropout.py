"""Mask of dropout on the attention weights, as a function of a seed and the pair only.

    k0, k1 = the first two words of Philox4x32-10(key = seed, counter = (i, b·H + h, 0, 0))
    x = mix(j·0x9E3779B9 + k0, k1);   keep = x >= floor(p·2³²)

The forward, the backward and all implementations compute the same mask, so it is never stored. The
cost is one Philox call per query and a few integer operations per pair. `mix` is the finalizer of
MurmurHash3 with the second key between its halves. Notation: rpe_ops/README.md.

Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011 (Philox).
"""

import torch
from torch import Tensor

__all__ = ["keep_mask"]

_LOW = 0xFFFFFFFF


def keep_mask(
    seed: Tensor, batch: int, heads: int, queries: int, keys: int, dropout_p: float
) -> Tensor:
    """Return the mask of a whole attention.

    Args:
        seed: One int64, shape `(1,)`.
        batch: Batch size, `B`.
        heads: Number of heads, `H`.
        queries: Number of queries, `L_q`.
        keys: Number of keys, `L_k`.
        dropout_p: Probability of dropping, in [0, 1).

    Returns:
        `(B, H, L_q, L_k)` bool, True where a weight survives.
    """
    device = seed.device
    i = torch.arange(queries, device=device)
    bh = torch.arange(batch * heads, device=device)[:, None]
    k0, k1 = _philox(seed, i.expand(len(bh), -1), bh.expand(-1, queries))
    j = torch.arange(keys, device=device)
    x = (j * 0x9E3779B9 + k0[..., None]) & _LOW
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _LOW
    x = x ^ k1[..., None]
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _LOW
    x = x ^ (x >> 16)
    return (x >= int(dropout_p * 2**32)).view(batch, heads, queries, keys)


def _philox(seed: Tensor, c0: Tensor, c1: Tensor) -> tuple[Tensor, Tensor]:
    """Return words 0 and 1 of Philox4x32-10 with counter (c0, c1, 0, 0), as int64 in [0, 2³²)."""
    c2 = c3 = torch.zeros_like(c0)
    key0, key1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        # int64 wraps modulo 2⁶⁴, so both halves of the unsigned product are correct.
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        high0, high1 = ((product >> 32) & _LOW for product in (product0, product1))
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, product1 & _LOW, high0 ^ c3 ^ key1, product0 & _LOW
        key0, key1 = (key0 + 0x9E3779B9) & _LOW, (key1 + 0xBB67AE85) & _LOW
    return c0, c1
