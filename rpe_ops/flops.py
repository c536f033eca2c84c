"""What the operators cost, for `torch.utils.flop_counter.FlopCounterMode`.

As for torch's own attention, the products of matrices are counted: two forward, and backward five,
since the logits are computed anew; and those with the tables. Gather and bucket sum multiply
nothing.

Torch's counter takes seconds to import, Triton and all, so `rpe_ops` imports this module only where
the counter is there already: import the counter before `rpe_ops`, or this module.
"""

import math

import torch
from torch.utils.flop_counter import register_flop_formula

import rpe_ops.ops  # noqa: F401  (defines the operators)

__all__: list[str] = []


@register_flop_formula(torch.ops.rpe_ops.attention)
def _attention_flops(q, k, v, *rest, out_shape=None, **kwargs) -> int:
    lookups, values = _table_products(q, *rest[:3])
    return 2 * _product(q, q[-2]) + lookups + values


@register_flop_formula(torch.ops.rpe_ops.attention_backward)
def _attention_backward_flops(grad_out, q, k, v, *rest, out_shape=None, **kwargs) -> int:
    lookups, values = _table_products(q, *rest[:3])
    # A product has two gradients, and lookups are made anew.
    return 5 * _product(q, q[-2]) + 3 * lookups + 2 * values


def _table_products(q, table_k, table_q, table_v) -> tuple[int, int]:
    """Flops of the lookups and of the values' part; a bias, of two dimensions, has none."""
    lookups = [_product(q, x[2]) for x in (table_k, table_q) if x is not None and len(x) == 3]
    return sum(lookups), 0 if table_v is None else _product(q, table_v[1])


def _product(shape: tuple[int, ...], width: int) -> int:
    """Of one `(L, d) x (d, width)` in every head."""
    return 2 * math.prod(shape) * width
