"""Reference implementation in plain torch, and the oracle of every other one.

    gather:      out[b,h,i,j] = lookup[b,h,i, index[i,j]]
    bucket sum:  out[b,h,i,n] = Σ_j [index[i,j] = n] · pairs[b,h,i,j]

Source: the efficient implementation described in iRPE (Wu et al., ICCV 2021). Runs on every device.
On CUDA the bucket sum uses atomics, so its last bits differ from run to run.
"""

import torch
from torch import Tensor

__all__ = ["gather", "bucket_sum"]


def gather(lookup: Tensor, index: Tensor) -> Tensor:
    """Spread per-bucket values over the pairs; see `rpe_ops.gather`."""
    index = index.long().expand(*lookup.shape[:-1], index.shape[-1])
    return torch.gather(lookup, -1, index)


def bucket_sum(pairs: Tensor, index: Tensor, num_buckets: int) -> Tensor:
    """Sum the pairs of every bucket, low precision in float32; see `rpe_ops.bucket_sum`."""
    accumulate_dtype = torch.promote_types(pairs.dtype, torch.float32)
    sums = pairs.new_zeros(*pairs.shape[:-1], num_buckets, dtype=accumulate_dtype)
    sums.scatter_add_(-1, index.long().expand_as(pairs), pairs.to(accumulate_dtype))
    return sums.to(pairs.dtype)
