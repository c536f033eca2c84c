"""Compile the attention kernels of the recipes ahead of time, without a GPU, and print their cost.

    python -m tests.rpe_ops.aot [--quick]

The launchers are called on meta tensors, with recorders instead of the kernels, and every recorded
launch is compiled. ptxas reports the registers and spills of the PTX. The exit status is 1 if a
kernel spills more than `MAX_SPILL_BYTES`.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from irpe_core import parse_rpe_spec
from irpe_core.buckets import grid_buckets
from rpe_ops import triton_kernels
from rpe_ops.triton_kernels import backward, forward, sums

__all__ = ["ARCHITECTURES", "MAX_SPILL_BYTES", "QUICK", "RECIPES", "Recipe", "Usage", "main"]

ARCHITECTURES = (80, 90)
MAX_SPILL_BYTES = 0


class Recipe(NamedTuple):
    """Attention layer of a recipe."""

    name: str
    spec: str
    height: int
    width: int
    skip: int
    head_dim: int
    dtype: torch.dtype
    dropout_p: float
    has_padding: bool


class Launch(NamedTuple):
    """A kernel and the arguments of its launch."""

    name: str
    kernel: triton.JITFunction
    arguments: dict[str, Any]


class Usage(NamedTuple):
    """Resources of a compiled kernel: registers per thread, spilled and shared bytes."""

    registers: int
    spills: int
    shared: int


def _deit(name: str, letters: str) -> Recipe:
    spec = f"rpe-1.9-product-ctx-1-{letters}"
    return Recipe(f"{name} {letters}", spec, 14, 14, 1, 64, torch.bfloat16, 0.0, False)


def _detr(height: int, width: int, letters: str, dtype: torch.dtype) -> Recipe:
    name = f"DETR {height}x{width} {letters} {str(dtype).removeprefix('torch.')}"
    spec = f"rpe-2.0-product-ctx-1-{letters}"
    return Recipe(name, spec, height, width, 0, 32, dtype, 0.1, True)


RECIPES = [
    _deit("DeiT-S/B", "k"),
    _deit("DeiT-S/B", "qkv"),
    *(
        _detr(height, width, letters, dtype)
        for height, width in ((25, 42), (50, 84))
        for letters in ("k", "qkv")
        for dtype in (torch.bfloat16, torch.float16)
    ),
    _detr(25, 42, "k", torch.float32),
]
QUICK = [_detr(25, 42, "qkv", torch.bfloat16)]


def launches(recipe: Recipe) -> list[Launch]:
    """Return every kernel launch of a step, forward and backward."""
    config = parse_rpe_spec(recipe.spec, skip=recipe.skip)
    buckets = grid_buckets(config, recipe.height, recipe.width, "meta")

    def tensor(*shape: int, dtype: torch.dtype = recipe.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    tokens, heads = buckets.num_tokens, 6
    qkv = tensor(2, tokens, 3, heads, recipe.head_dim).permute(2, 0, 3, 1, 4).unbind()
    table = tensor(1, recipe.head_dim, buckets.num_lookups)
    tables = [table if letter in config.rpe_on else None for letter in "kq"]
    tables.append(table.transpose(1, 2) if "v" in config.rpe_on else None)
    padding = tensor(2, tokens, dtype=torch.bool) if recipe.has_padding else None
    inputs = (*qkv, *tables, buckets, padding, tensor(1, dtype=torch.int64))
    numbers = (recipe.head_dim**-0.5, recipe.dropout_p)
    found: list[Launch] = []
    with (
        _recorded(forward, "_forward_kernel", found),
        _recorded(sums, "_sums_kernel", found),
        _recorded(backward, "_backward_kernel", found),
    ):
        outputs = triton_kernels.attention_forward(*inputs, *numbers)
        grad_out = tensor(*qkv[0].shape)
        triton_kernels.attention_backward(grad_out, *inputs, *outputs, *numbers)
    return found


def _recorded(module: Any, name: str, found: list[Launch]) -> Any:
    """Replace a kernel by a recorder."""
    kernel = getattr(module, name)

    def record(**arguments: Any) -> None:
        side = {None: "", False: " queries", True: " keys"}[arguments.get("FROM_KEYS")]
        found.append(Launch(name.strip("_").removesuffix("_kernel") + side, kernel, arguments))

    recorder = mock.MagicMock()
    recorder.__getitem__.return_value = record
    return mock.patch.object(module, name, recorder)


def compile_launch(launch: Launch, architecture: int) -> Usage:
    """Compile a launch for `sm_{architecture}`."""
    arguments = dict(launch.arguments)
    options = {name: arguments.pop(name) for name in ("num_warps", "num_stages", "maxnreg")}
    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(launch.kernel.params):
        value = arguments.pop(parameter.name)
        if parameter.is_constexpr:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        signature[parameter.name] = triton.runtime.jit.mangle_type(value)
        is_multiple = isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0)
        if is_multiple and not parameter.do_not_specialize:
            attributes[(position,)] = [["tt.divisibility", 16]]
    assert not arguments, f"unknown arguments of the kernel: {', '.join(arguments)}"
    source = ASTSource(launch.kernel, signature, constants, attributes)
    target = GPUTarget("cuda", architecture, 32)
    compiled = triton.compile(source, target=target, options=options)
    registers, spills = _ask_ptxas(compiled.asm["ptx"], architecture)
    return Usage(registers, spills, compiled.metadata.shared)


def _ask_ptxas(ptx: str, architecture: int) -> tuple[int, int]:
    """Return the registers per thread and the spilled bytes of a kernel."""
    target = re.search(r"\.target (\w+)", ptx)[1]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [get_ptxas(architecture).path, "-v", "--regAllocOptLevel=2", "--gpu-name", target]
        command += [str(source), "-o", f"{folder}/kernel.cubin"]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", output)
    registers = int(re.search(r"Used (\d+) registers", output)[1])
    return registers, int(spilled[1]) + int(spilled[2])


def main(argv: list[str]) -> int:
    """Compile all launches, print them as rows and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one recipe only")
    recipes = QUICK if parser.parse_args(argv).quick else RECIPES
    print("| recipe | kernel | tile, warps | arch | registers | spill bytes | shared memory |")
    print("|---|---|---|---|---|---|---|")
    status = 0
    for recipe in recipes:
        for launch in launches(recipe):
            tile = "{BLOCK_OWN}x{BLOCK_OTHER}, {num_warps}".format_map(launch.arguments)
            for architecture in ARCHITECTURES:
                usage = compile_launch(launch, architecture)
                cells = (recipe.name, launch.name, tile, f"sm_{architecture}", *usage)
                print("|", " | ".join(map(str, cells)), "|", flush=True)
                status |= usage.spills > MAX_SPILL_BYTES
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
