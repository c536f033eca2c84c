"""Triton kernels of all operators; no other module of `rpe_ops` needs Triton.

The functions and their signatures are those of `rpe_ops.reference`. The kernels are deterministic:
one program sums every element that is written, in a fixed order, without atomics. The products with
the tables are computed by torch. Notation: rpe_ops/README.md.
"""

from functools import partial
from types import SimpleNamespace

from rpe_ops import tables
from rpe_ops.triton_kernels.attention import lookup_backward, lookup_forward
from rpe_ops.triton_kernels.gather_kernels import bucket_sum, gather

__all__ = ["gather", "bucket_sum", "attention_forward", "attention_backward", "variant"]

attention_forward = partial(tables.attention_forward, lookup_forward)
attention_backward = partial(tables.attention_backward, lookup_backward)


def variant(name: str) -> SimpleNamespace:
    """Return `attention_forward` and `attention_backward` with the kernels of one family."""
    return SimpleNamespace(
        attention_forward=partial(tables.attention_forward, partial(lookup_forward, family=name)),
        attention_backward=partial(
            tables.attention_backward, partial(lookup_backward, family=name)
        ),
    )
