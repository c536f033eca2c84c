"""Section `extension`: the CUDA extension is built, emulated on the CPU, and compared on the GPU.

The library is built into a folder of the user's cache, which is on the path of the later sections.
"""

import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch

from rpe_ops import implementations, library
from scripts.benchmark.gpu import conditions, operators
from scripts.benchmark.gpu.client import ROOT
from scripts.benchmark.gpu.setup import Check, Setup, SkipError, require

__all__ = ["checks"]

_MAX_REGISTERS = 64
_SHOWN_CHARACTERS = 1500


def checks(setup: Setup) -> dict[str, Check]:
    """Return the checks of this section by name."""
    found: dict[str, Check] = {"build": partial(_build, setup)}
    found |= operators.checks(setup, "cuda")
    found |= conditions.checks(setup, "cuda", "gather")
    found["emulation on the CPU"] = partial(_emulation, setup)
    # The library may have been built since this process searched for it.
    return {name: partial(_after_search, check) for name, check in found.items()}


def _after_search(check: Check) -> dict:
    """Search for the library again if there was none, then run a check."""
    if library.load_library():
        library._loaded.cache_clear()
        implementations._reason_against.cache_clear()
    return check()


def _build(setup: Setup) -> dict:
    """Build the extension with its CUDA kernels, and read the compiler's report."""
    setup.require_gpu("the build with CUDA kernels")
    home = _cuda_home()
    major, minor = torch.cuda.get_device_capability()
    environment = {
        "FORCE_CUDA": "1",
        "CUDA_HOME": str(home),
        "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}",
        "NVCC_APPEND_FLAGS": "-Xptxas -v",
    }
    folders = ("--build-lib", str(setup.build), "--build-temp", str(setup.build / "objects"))
    output = _output([sys.executable, "setup.py", "build_ext", *folders], "rpe_ops", environment)
    found = {
        "registers": max(map(int, re.findall(r"Used (\d+) registers", output)), default=None),
        "bytes spilled": max(map(int, re.findall(r"(\d+) bytes spill", output)), default=None),
    }
    library._loaded.cache_clear()
    implementations._reason_against.cache_clear()
    if reason := library.reason_without_cuda():
        raise RuntimeError(f"the library was built but cannot be used: {reason}")
    errors = {}
    if found["bytes spilled"]:
        errors["spills"] = f"a kernel spills {found['bytes spilled']} bytes of registers"
    if (found["registers"] or 0) > _MAX_REGISTERS:
        errors["registers"] = f"a kernel uses {found['registers']} registers"
    return found | {"errors": errors}


def _cuda_home() -> Path:
    """Return the folder of the CUDA toolkit.

    Raises:
        SkipError: There is none.
    """
    from torch.utils import cpp_extension

    nvcc = shutil.which("nvcc")
    places = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", cpp_extension.CUDA_HOME]
    places.append(nvcc and Path(nvcc).resolve().parents[1])
    for home in places:
        if home and Path(home, "bin", "nvcc").exists():
            return Path(home)
    raise SkipError("needs nvcc, which is neither under CUDA_HOME nor in /usr/local/cuda")


def _output(command: list[str], folder: str, environment: dict[str, str]) -> str:
    """Run a command in a folder of the repository and return what it prints."""
    done = subprocess.run(
        command,
        cwd=ROOT / folder,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    print(done.stdout)
    if done.returncode:
        end = done.stdout.strip()[-_SHOWN_CHARACTERS:]
        raise RuntimeError(f"{' '.join(command[1:4])} failed with {done.returncode}: {end}")
    return done.stdout


def _emulation(setup: Setup) -> dict:
    """Run the test that executes the CUDA kernels on the CPU, one thread per lane."""
    if setup.dry_run:
        raise SkipError("a dry run compiles nothing")
    require("pytest", "filelock")
    test = "tests/rpe_ops/test_cuda_build.py"
    options = ["-q", "-p", "no:cacheprovider", "-k", "thread_for_every_lane", "-rs"]
    output = _output([sys.executable, "-m", "pytest", test, *options], ".", {})
    if "1 passed" not in output:
        raise SkipError(output.strip().splitlines()[-1])
    return {}
