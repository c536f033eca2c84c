"""Checks of the operators' arguments, one message per rule."""

import torch
from torch import Tensor

__all__ = ["check_pair_index", "check_floating", "check_bounds"]


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless `tensor` is floating point with at least two dimensions."""
    if not tensor.is_floating_point() or tensor.ndim < 2:
        raise ValueError(
            f"{name} must be a floating-point tensor of shape (..., L_q, N), "
            f"got {tensor.dtype} of shape {tuple(tensor.shape)}"
        )


def check_pair_index(index: Tensor, num_queries: int, device: torch.device) -> None:
    """Raise ValueError unless `index` holds integers of shape (num_queries, L_k) on `device`."""
    if index.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"index must be int32 or int64, got {index.dtype}")
    if index.ndim != 2 or index.shape[0] != num_queries:
        raise ValueError(
            f"index must have shape (L_q, L_k) with L_q = {num_queries}, got {tuple(index.shape)}"
        )
    if index.device != device:
        raise ValueError(f"index is on {index.device}, the values are on {device}")


def check_bounds(index: Tensor, num_buckets: int) -> None:
    """Raise IndexError unless every bucket lies in [0, num_buckets); waits for the device."""
    if index.numel() == 0:
        return
    smallest, largest = (int(bound) for bound in torch.aminmax(index))
    if smallest < 0 or largest >= num_buckets:
        raise IndexError(
            f"index holds buckets from {smallest} to {largest}, allowed are 0 to {num_buckets - 1}"
        )
