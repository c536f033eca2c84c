"""How the attention kernels are launched: shapes of tiles, and arguments they have in common."""

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
]

# Sizes of every grid and batch would otherwise be compiled for, by Triton's habit, where they
# happen to be 1 or a multiple of 16.
RUNTIME_SIZES = [
    *("heads", "height", "width", "skip", "num_buckets", "run_width"),
    *("tiles", "own_chunks", "other_chunks", "threshold"),
]


class Tiles(NamedTuple):
    """Tiles of a program and what it runs on.

    Attributes:
        own: Columns of the program's own grid row.
        other: Columns of the grid rows it meets.
        warps: Warps of the program.
        stages: Stages of its pipeline of loads.
    """

    own: int
    other: int
    warps: int
    stages: int


def choose_tiles(
    buckets: GridBuckets, head_dim: int, dtype: torch.dtype, *, backward: bool
) -> Tiles:
    """Tiles by shape alone, so that results never depend on a measurement.

    Small ones: a grid row is seldom longer than 84 and its rest is computed in vain, and with the
    lookups of a tile, its sums and the rows of four matrices there are few registers left.
    """
    # A wider tile only where it covers the row with no more columns in all.
    wide = not backward and -(-buckets.width // 32) * 2 <= -(-buckets.width // 16)
    warps = _next_power_of_2(head_dim) // 32 * (4 if dtype == torch.float32 else 1)
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
    """Arguments that every attention kernel takes, by name. What is absent is passed as `q`."""
    # Lookups are divided by it, to be multiplied again with the product that they are added to.
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
        # The bits of the uint32, in the one type that every value fits.
        "threshold": threshold - 2**32 if threshold >= 2**31 else threshold,
        "keep_scale": 1 / (1 - dropout_p),
        "HAS_PADDING": key_padding is not None,
        "HAS_DROPOUT": dropout_p > 0,
        "HAS_SKIP": int(has_skip),
        "TERMS": buckets.row_base.shape[0],
        "SEPARABLE": buckets.local.shape[1] == 1,
        "DIM": q.shape[-1],
        "BLOCK_DIM": max(16, _next_power_of_2(q.shape[-1])),
        "BLOCK_ROWS": _next_power_of_2(buckets.height),
        "BLOCK_OWN": tiles.own,
        "BLOCK_OTHER": tiles.other,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
        # Otherwise ptxas spills some for the sake of more programs at a time.
        "maxnreg": 255,
    }


def matrices(**named: Tensor) -> dict:
    """Tensors `(B, H, L, n)` as pointers `p_name` and strides `name_b`, `name_h`, `name_l`."""
    arguments = {}
    for name, x in named.items():
        # Offsets within a head are 32-bit: a head spread wider than that is copied.
        if x.stride(-1) != 1 or x.shape[2] * x.stride(2) >= 2**31:
            x = x.contiguous()
        arguments[f"p_{name}"] = x
        arguments |= {f"{name}_{axis}": x.stride(i) for i, axis in enumerate("bhl")}
    return arguments


def sums_block(buckets: GridBuckets) -> int:
    """Columns of the sums that a program keeps: all local buckets, a power of two."""
    return max(16, _next_power_of_2(buckets.run_width))


def device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Make a GPU tensor's device the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _next_power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()
