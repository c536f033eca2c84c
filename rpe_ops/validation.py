"""Checks of the operators' arguments, one message per rule. Notation: rpe_ops/README.md."""

import torch
from torch import Tensor

from rpe_ops.grid import GridBuckets

__all__ = [
    "MAX_BUCKETS",
    "check_bucket_ids",
    "check_floating",
    "check_num_buckets",
    "check_bounds",
    "check_attention",
]

# As in csrc/checks.h: a mistaken number of buckets does not reserve all memory.
MAX_BUCKETS = 2**20
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless `tensor` has a supported dtype and at least two dimensions."""
    if tensor.dtype not in _DTYPES or tensor.ndim < 2:
        raise ValueError(
            f"{name} must be a tensor of float16, bfloat16, float32 or float64 and shape "
            f"(..., L_q, N), got {tensor.dtype} of shape {tuple(tensor.shape)}"
        )


def check_num_buckets(num_buckets: int) -> None:
    """Raise ValueError unless a number of buckets is an integer in [1, `MAX_BUCKETS`]."""
    whole = isinstance(num_buckets, (int, torch.SymInt))
    if not whole or not 1 <= num_buckets <= MAX_BUCKETS:
        raise ValueError(f"num_buckets must be in [1, {MAX_BUCKETS}], got {num_buckets}")


def check_bucket_ids(bucket_ids: Tensor, num_queries: int, device: torch.device) -> None:
    """Raise ValueError unless these are integers of shape `(num_queries, L_k)` on `device`."""
    if bucket_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"bucket_ids must be int32 or int64, got {bucket_ids.dtype}")
    if bucket_ids.ndim != 2 or bucket_ids.shape[0] != num_queries:
        raise ValueError(
            f"bucket_ids must have shape (L_q, L_k) with L_q = {num_queries}, "
            f"got {tuple(bucket_ids.shape)}"
        )
    if bucket_ids.device != device:
        raise ValueError(
            f"bucket_ids must be on the device of the values, {device}, got {bucket_ids.device}"
        )


def check_bounds(bucket_ids: Tensor, num_buckets: int) -> None:
    """Raise IndexError unless all bucket ids are in [0, num_buckets); waits for the device."""
    if bucket_ids.numel() == 0:
        return
    smallest, largest = (int(bound) for bound in torch.aminmax(bucket_ids))
    if smallest < 0 or largest >= num_buckets:
        raise IndexError(
            f"bucket_ids must be in [0, {num_buckets}), got values from {smallest} to {largest}"
        )


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    buckets: GridBuckets,
    tables: dict[str, Tensor | None],
    key_padding: Tensor | None,
    dropout_p: float,
    scale: float | None,
) -> None:
    """Raise ValueError unless the arguments of `rpe_ops.attention` are valid."""
    shape, dtype, device = q.shape, q.dtype, q.device
    if len(shape) != 4 or shape[2] != buckets.num_tokens or shape[3] == 0 or dtype not in _DTYPES:
        raise ValueError(
            "q must be a tensor of float16, bfloat16, float32 or float64 and shape (B, H, L, d), "
            f"L = {buckets.num_tokens} for this grid, got {dtype} of shape {tuple(shape)}"
        )
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape != shape:
            raise ValueError(
                f"{name} must have the shape of q, {tuple(shape)}, got {tuple(tensor.shape)}"
            )
    given = {name: table for name, table in tables.items() if table is not None}
    for name, table in given.items():
        _check_table(name, table, shape[1], shape[3], buckets.num_lookups)
    for name, tensor in (("k", k), ("v", v), *given.items()):
        if tensor.dtype != dtype:
            raise ValueError(f"{name} must have the dtype of q, {dtype}, got {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(_device_message(name, device, tensor.device))
    if buckets.row_base.device != device:
        raise ValueError(_device_message("buckets", device, buckets.row_base.device))
    _check_padding(key_padding, (shape[0], shape[2]), device)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    # torch.compile cannot trace math.isfinite of a symbolic number.
    if scale is not None and not 0 < abs(scale) < float("inf"):
        raise ValueError(f"scale must be finite and not 0, got {scale}")


def _device_message(name: str, expected: torch.device, device: torch.device) -> str:
    """Return the message for an argument on a device that `q` is not on."""
    return f"{name} must be on the device of q, {expected}, got {device}"


def _check_table(name: str, table: Tensor, heads: int, dim: int, num_lookups: int) -> None:
    """Raise ValueError unless a table has the shape of its name, see `rpe_ops.attention`."""
    allowed = [(dim, num_lookups), (num_lookups,)] if name != "table_v" else [(num_lookups, dim)]
    if table.ndim < 2 or table.shape[0] not in (1, heads) or tuple(table.shape[1:]) not in allowed:
        shapes = " or ".join(str((f"1 or {heads}", *shape)).replace("'", "") for shape in allowed)
        raise ValueError(f"{name} must have shape {shapes}, got {tuple(table.shape)}")


def _check_padding(padding: Tensor | None, shape: tuple[int, int], device: torch.device) -> None:
    """Raise ValueError unless `padding` is None or bool of `shape` on `device`."""
    if padding is None:
        return
    if padding.dtype != torch.bool or tuple(padding.shape) != shape:
        raise ValueError(
            f"key_padding must be bool of shape (B, L) = {shape}, "
            f"got {padding.dtype} of shape {tuple(padding.shape)}"
        )
    if padding.device != device:
        raise ValueError(_device_message("key_padding", device, padding.device))
