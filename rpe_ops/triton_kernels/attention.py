"""Choice between the two families of attention kernels, by shape only.

`flat` kernels have full tiles of tokens and load the bucket id of every pair. `rows` kernels have
tiles of grid rows, compute the buckets from the axis offsets, and need no memory for pairs. The
flat kernels need fewer instructions per pair, so they run wherever the ids are small
(`rpe_ops.compact_ids`), except for float32 with large heads, where they would spill registers.
"""

import torch
from torch import Tensor

from rpe_ops.compact_ids import is_small
from rpe_ops.grid import GridBuckets
from rpe_ops.triton_kernels import backward, flat_backward, flat_forward, forward

__all__ = ["choose_family", "lookup_forward", "lookup_backward"]


def choose_family(q: Tensor, buckets: GridBuckets) -> str:
    """Return the kernels for queries `(B, H, L, d)` on a grid, `flat` or `rows`."""
    would_spill = q.dtype == torch.float32 and q.shape[-1] > 64
    return "flat" if is_small(buckets) and not would_spill else "rows"


def lookup_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lookup_k: Tensor | None,
    lookup_q: Tensor | None,
    buckets: GridBuckets,
    *rest,
    family: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend; see `rpe_ops.reference.lookup_forward`.

    The dtype must not be float64, and the head dim must be at most 128. `family` is one of
    `rpe_ops.VARIANTS["triton"]`, by default the choice of `choose_family`.
    """
    inputs = (q, k, v, lookup_k, lookup_q, buckets, *rest)
    family = family or choose_family(q, buckets)
    if family == "rows":
        return forward.lookup_forward(*inputs)
    return flat_forward.lookup_forward(*inputs, wide=family == "flat_wide")


def lookup_backward(
    grad_out: Tensor,
    grad_sums: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lookup_k: Tensor | None,
    lookup_q: Tensor | None,
    buckets: GridBuckets,
    *rest,
    family: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Compute the gradients; see `rpe_ops.reference.lookup_backward`, and `lookup_forward`."""
    inputs = (grad_out, grad_sums, q, k, v, lookup_k, lookup_q, buckets, *rest)
    family = family or choose_family(q, buckets)
    if family == "rows":
        return backward.lookup_backward(*inputs)
    return flat_backward.lookup_backward(*inputs, wide=family == "flat_wide")
