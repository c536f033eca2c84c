"""Operators of image relative position encoding: gather and bucket sum.

Both map between *lookups* `(B, H, L_q, K)`, one value per query and bucket, and *pairs*
`(B, H, L_q, L_k)`, one value per query and key, through the bucket of every pair. Each is the
other's backward. Needs nothing but torch.
"""

from rpe_ops.api import bucket_sum, gather
from rpe_ops.implementations import IMPLEMENTATIONS, available_implementations, can_run, resolve

__all__ = [
    "gather",
    "bucket_sum",
    "IMPLEMENTATIONS",
    "available_implementations",
    "can_run",
    "resolve",
]
