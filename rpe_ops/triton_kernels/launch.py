"""Launch of the attention kernels: shapes of tiles and common arguments."""

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor

from rpe_ops.grid import GridBuckets

__all__ = [
    "RUNTIME_SIZES",
    "Tiles",
    "choose_tiles",
    "common_arguments",
    "matrices",
    "sums_block",
    "device_of",
    "next_power_of_2",
]

# Triton compiles a kernel again when an integer argument becomes 1 or a multiple of 16. These sizes
# change with the grid and the batch, so that is switched off for them.
RUNTIME_SIZES = [
    *("heads", "height", "width", "skip", "num_buckets", "run_width"),
    *("tiles", "own_chunks", "other_chunks", "threshold"),
]


class Tiles(NamedTuple):
    """Shape of a program's tiles, and its warps and pipeline stages.

    Attributes:
        own: Columns of the program's own grid row.
        other: Columns of the other grid rows.
        warps: Warps of the program.
        stages: Pipeline stages of its loads.
    """

    own: int
    other: int
    warps: int
    stages: int


def choose_tiles(
    buckets: GridBuckets, head_dim: int, dtype: torch.dtype, *, backward: bool
) -> Tiles:
    """Choose the tiles by shape only, so that results never depend on a measurement.

    The tiles are small for two reasons. A grid row is rarely longer than 84 tokens, and columns
    beyond its end are wasted work. The lookups and sums of a tile and the rows of four matrices
    leave few registers.
    """
    # A wider tile is used only if it covers the row with the same total number of columns.
    wide = not backward and -(-buckets.width // 32) * 2 <= -(-buckets.width // 16)
    warps = next_power_of_2(head_dim) // 32 * (4 if dtype == torch.float32 else 1)
    warps *= 2 if sums_block(buckets) > 64 else 1
    return Tiles(16, 32 if wide else 16, min(8, max(1, warps)), 1 if backward else 2)


def common_arguments(
    q: Tensor,
    buckets: GridBuckets,
    key_padding: Tensor | None,
    seed: Tensor,
    scale: float,
    dropout_p: float,
    tiles: Tiles,
) -> dict:
    """Return the arguments of all attention kernels, by name; an absent tensor is passed as `q`."""
    # The kernels add lookup / scale to the product of q and k, then multiply the sum by the scale.
    assert scale != 0
    columns = max(buckets.width, buckets.skip)
    own_chunks, other_chunks = -(-columns // tiles.own), -(-columns // tiles.other)
    has_skip = buckets.skip > 0
    threshold = int(dropout_p * 2**32)
    padding = q if key_padding is None else key_padding.contiguous().view(torch.uint8)
    return {
        "p_row_base": buckets.row_base.contiguous(),
        "p_local": buckets.local.contiguous(),
        "p_padding": padding,
        "p_seed": seed,
        "heads": q.shape[1],
        "height": buckets.height,
        "width": buckets.width,
        "skip": buckets.skip,
        "num_buckets": buckets.num_buckets,
        "tiles": (buckets.height + has_skip) * own_chunks,
        "own_chunks": own_chunks,
        "other_chunks": other_chunks,
        "scale": scale,
        # Triton derives the type of an integer from its value. The bits of the uint32 are passed as
        # an int32, so that the type is always the same.
        "threshold": threshold - 2**32 if threshold >= 2**31 else threshold,
        "keep_scale": 1 / (1 - dropout_p),
        "HAS_PADDING": key_padding is not None,
        "HAS_DROPOUT": dropout_p > 0,
        "HAS_SKIP": int(has_skip),
        "TERMS": buckets.row_base.shape[0],
        "SEPARABLE": buckets.local.shape[1] == 1,
        "DIM": q.shape[-1],
        "BLOCK_DIM": max(16, next_power_of_2(q.shape[-1])),
        "BLOCK_ROWS": next_power_of_2(buckets.height),
        "BLOCK_OWN": tiles.own,
        "BLOCK_OTHER": tiles.other,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
        # Without this limit ptxas spills registers in order to run more programs at a time.
        "maxnreg": 255,
    }


def matrices(**named: Tensor) -> dict:
    """Return tensors `(B, H, L, n)` as `p_name` and strides `name_b`, `name_h`, `name_l`."""
    arguments = {}
    for name, x in named.items():
        # Offsets within a head are 32-bit, so a head that spans more memory is copied.
        if x.stride(-1) != 1 or x.shape[2] * x.stride(2) >= 2**31:
            x = x.contiguous()
        arguments[f"p_{name}"] = x
        arguments |= {f"{name}_{axis}": x.stride(i) for i, axis in enumerate("bhl")}
    return arguments


def sums_block(buckets: GridBuckets) -> int:
    """Return the columns of a program's sums: all local buckets, rounded up to a power of two."""
    return max(16, next_power_of_2(buckets.run_width))


def device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Return a context in which the device of a GPU tensor is the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def next_power_of_2(number: int) -> int:
    """Return the smallest power of two that is not less than `number`."""
    return 1 << (number - 1).bit_length()
