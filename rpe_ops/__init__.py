"""Operators of image relative position encoding: gather, bucket sum and attention with both.

Gather and bucket sum map between *lookups* `(B, H, L_q, K)`, one value per query and bucket, and
*pairs* `(B, H, L_q, L_k)`, one value per query and key, through the bucket of every pair. Each is
the other's backward. Attention fuses them with all that is around them. Needs nothing but torch.
"""

import sys

from rpe_ops.api import attention, bucket_sum, gather
from rpe_ops.grid import GridBuckets
from rpe_ops.implementations import (
    IMPLEMENTATIONS,
    OPERATORS,
    ImplementationError,
    available_implementations,
    can_run,
    reason_against_input,
    resolve,
)

if "torch.utils.flop_counter" in sys.modules:
    from rpe_ops import flops  # noqa: F401  (registers the formulas)

__all__ = [
    "gather",
    "bucket_sum",
    "attention",
    "GridBuckets",
    "IMPLEMENTATIONS",
    "OPERATORS",
    "ImplementationError",
    "available_implementations",
    "can_run",
    "reason_against_input",
    "resolve",
]
