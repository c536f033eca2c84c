"""Triton kernels of every operator; the only package here that imports Triton.

Same functions and signatures as `rpe_ops.reference`. Deterministic: every element that a kernel
writes is summed by one program in a fixed order, without atomics; products with the tables are
torch's.
"""

from functools import partial

from rpe_ops import tables
from rpe_ops.triton_kernels.backward import lookup_backward
from rpe_ops.triton_kernels.forward import lookup_forward
from rpe_ops.triton_kernels.index_ops import bucket_sum, gather

__all__ = ["gather", "bucket_sum", "attention_forward", "attention_backward"]

attention_forward = partial(tables.attention_forward, lookup_forward)
attention_backward = partial(tables.attention_backward, lookup_backward)
