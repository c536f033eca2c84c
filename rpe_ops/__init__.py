"""Operators of image relative position encoding (iRPE): gather, bucket sum and attention.

Gather and bucket sum map between *lookups* `(B, H, L_q, K)`, one value per query and bucket, and
*pairs* `(B, H, L_q, L_k)`, one value per query and key. Each is the backward of the other.
Attention computes both inside one operator. The package needs torch only.
Notation: rpe_ops/README.md.
"""

import sys

from rpe_ops.api import attention, bucket_sum, gather
from rpe_ops.grid import GridBuckets
from rpe_ops.implementations import (
    IMPLEMENTATIONS,
    OPERATORS,
    VARIANTS,
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
    "VARIANTS",
    "ImplementationError",
    "available_implementations",
    "can_run",
    "reason_against_input",
    "resolve",
]
