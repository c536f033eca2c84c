"""Flop formulas of the operators for `torch.utils.flop_counter.FlopCounterMode`.

As for torch's own attention, only matrix products are counted: two in the forward, five in the
backward (which recomputes the logits), and the products with the tables. Gather and bucket sum
contain no product.

torch's counter takes seconds to import because it imports Triton. So `rpe_ops` imports this module
only if the counter is imported already: import the counter before `rpe_ops`, or import this module.
"""

import math

import torch
from torch.utils.flop_counter import register_flop_formula

import rpe_ops.ops  # noqa: F401  (defines the operators)

__all__: list[str] = []


@register_flop_formula(torch.ops.rpe_ops.attention)
def _attention_flops(q, k, v, *rest, out_shape=None, **kwargs) -> int:
    """Count the flops of `rpe_ops::attention`."""
    lookups, values = _table_products(q, *rest[:3])
    return 2 * _product(q, q[-2]) + lookups + values


@register_flop_formula(torch.ops.rpe_ops.attention_backward)
def _attention_backward_flops(grad_out, q, k, v, *rest, out_shape=None, **kwargs) -> int:
    """Count the flops of `rpe_ops::attention_backward`."""
    lookups, values = _table_products(q, *rest[:3])
    # A product has two gradients, and the lookups are recomputed.
    return 5 * _product(q, q[-2]) + 3 * lookups + 2 * values


def _table_products(q, table_k, table_q, table_v) -> tuple[int, int]:
    """Return the flops of the lookups and of the product with `table_v`; a bias has none."""
    lookups = [_product(q, x[2]) for x in (table_k, table_q) if x is not None and len(x) == 3]
    return sum(lookups), 0 if table_v is None else _product(q, table_v[1])


def _product(shape: tuple[int, ...], width: int) -> int:
    """Return the flops of `(L, d) x (d, width)` in every head; `shape` is `(B, H, L, d)`."""
    return 2 * math.prod(shape) * width
