"""What the operators cost, for `torch.utils.flop_counter.FlopCounterMode`.

As for torch's own attention, the products of matrices are counted: two forward, and backward five,
since the logits are computed anew. Gather and bucket sum multiply nothing.

Torch's counter takes seconds to import, Triton and all, so `rpe_ops` imports this module only where
the counter is there already: import the counter before `rpe_ops`, or this module.
"""

import math

import torch
from torch.utils.flop_counter import register_flop_formula

import rpe_ops.ops  # noqa: F401  (defines the operators)

__all__: list[str] = []


@register_flop_formula(torch.ops.rpe_ops.attention)
def _attention_flops(q_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * _product(q_shape)


@register_flop_formula(torch.ops.rpe_ops.attention_backward)
def _attention_backward_flops(grad_shape, *args, out_shape=None, **kwargs) -> int:
    return 5 * _product(grad_shape)


def _product(shape: tuple[int, ...]) -> int:
    """Of one `(L, d) x (d, L)` in every head."""
    return 2 * math.prod(shape) * shape[-2]
