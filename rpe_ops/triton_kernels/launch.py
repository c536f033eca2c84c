"""Launch of the attention kernels: shapes of tiles and common arguments."""

import contextlib
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from rpe_ops.grid import GridBuckets

__all__ = [
    "RUNTIME_SIZES",
    "Tiles",
    "choose_tiles",
    "common_arguments",
    "matrices",
    "Launch",
    "prepare",
    "with_rows",
    "strides_of",
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

_OPTIONS = ("num_warps", "num_stages", "maxnreg")


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
    # One warp would spill registers in a wide tile of small heads (tests/rpe_ops/aot.py).
    fewest = 2 if wide and head_dim <= 16 else 1
    return Tiles(16, 32 if wide else 16, min(8, max(fewest, warps)), 1 if backward else 2)


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
    tensors = {name: with_rows(x) for name, x in named.items()}
    strides = strides_of(tuple(tensors), tuple(x.stride() for x in tensors.values()))
    return {f"p_{name}": x for name, x in tensors.items()} | strides


def with_rows(x: Tensor) -> Tensor:
    """Return a tensor `(B, H, L, n)`, or a copy if kernels cannot address its rows."""
    stride = x.stride()
    # Offsets within a head are 32-bit, so a head that spans more memory is copied.
    return x if stride[3] == 1 and x.shape[2] * stride[2] < 2**31 else x.contiguous()


def strides_of(names: tuple[str, ...], strides: tuple[tuple[int, ...], ...]) -> dict:
    """Return the strides of tensors `(B, H, L, n)` as `name_b`, `name_h` and `name_l`."""
    return {
        f"{name}_{axis}": size
        for name, stride in zip(names, strides, strict=True)
        for axis, size in zip("bhl", stride, strict=False)
    }


class Launch(NamedTuple):
    """A launch of a kernel that is ready but for its tensors.

    Attributes:
        kernel: The kernel. Its tensors `p_` are its first arguments.
        programs: Number of programs in each dimension.
        numbers: The arguments after the tensors. By position they cost the host less time.
        options: Options of Triton, such as the number of warps.
    """

    kernel: triton.JITFunction
    programs: tuple[int, ...]
    numbers: tuple
    options: dict

    def run(self, *tensors: Tensor) -> None:
        """Launch the kernel."""
        self.kernel[self.programs](*tensors, *self.numbers, **self.options)


def prepare(kernel: triton.JITFunction, programs: tuple[int, ...], numbers: dict) -> Launch:
    """Return a launch from numbers by name, which may have more names than the kernel needs."""
    names = [name for name in kernel.arg_names if not name.startswith("p_")]
    options = {name: numbers[name] for name in _OPTIONS if name in numbers}
    return Launch(kernel, programs, tuple(numbers[name] for name in names), options)


def sums_block(buckets: GridBuckets) -> int:
    """Return the columns of a program's sums: all local buckets, rounded up to a power of two."""
    return max(16, next_power_of_2(buckets.run_width))


def device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Return a context in which the device of a GPU tensor is the current one."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()


def next_power_of_2(number: int) -> int:
    """Return the smallest power of two that is not less than `number`."""
    return 1 << (number - 1).bit_length()
