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
from typing import NamedTuple

from triton.backends.nvidia.compiler import get_ptxas

from scripts.benchmark.kernel_model.launches import (
    Launch,
    compile_launch,
    name_launches,
    pretend_capability,
    record_launches,
)
from scripts.benchmark.kernel_model.recipes import QUICK, RECIPES, Recipe, attention_steps

__all__ = ["ARCHITECTURES", "MAX_SPILL_BYTES", "Usage", "main"]

ARCHITECTURES = (80, 90)
MAX_SPILL_BYTES = 0


class Usage(NamedTuple):
    """Resources of a compiled kernel: registers per thread, spilled and shared bytes."""

    registers: int
    spills: int
    shared: int


def launches(recipe: Recipe, architecture: int) -> list[Launch]:
    """Return every kernel launch of a training step, forward and backward."""
    with pretend_capability(architecture):
        steps = attention_steps(recipe, "meta")
        return [launch for step in steps.values() for launch in record_launches(step)[0]]


def usage(launch: Launch, architecture: int) -> Usage:
    """Compile a launch for `sm_{architecture}` and return its resources."""
    compiled = compile_launch(launch, architecture)
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


def _tile(launch: Launch) -> str:
    """Return the sizes of a launch's blocks and its warps."""
    prefix = "BLOCK_"
    sizes = [(name, x) for name, x in launch.constants.items() if name.startswith(prefix)]
    blocks = " ".join(f"{name.removeprefix(prefix).lower()} {x}" for name, x in sizes)
    return f"{blocks}, {launch.num_warps}"


def main(argv: list[str]) -> int:
    """Compile all launches, print them as rows and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two recipes only")
    recipes = QUICK if parser.parse_args(argv).quick else RECIPES
    print("| recipe | kernel | blocks, warps | arch | registers | spill bytes | shared memory |")
    print("|---|---|---|---|---|---|---|")
    status = 0
    for recipe in recipes:
        for architecture in ARCHITECTURES:
            found = launches(recipe, architecture)
            for name, launch in zip(name_launches(found), found, strict=True):
                used = usage(launch, architecture)
                cells = (recipe.name, name, _tile(launch), f"sm_{architecture}", *used)
                print("|", " | ".join(map(str, cells)), "|", flush=True)
                status |= used.spills > MAX_SPILL_BYTES
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
