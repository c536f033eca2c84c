"""The compiled operators of this checkout for the tests: built once, outside the checkout."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import filelock
import pytest
import torch
from torch.utils import cpp_extension

from rpe_ops import implementations, library

PACKAGE = Path(__file__).parents[2] / "rpe_ops"


def run_setup(*arguments: str, package: Path = PACKAGE, **environment: str) -> str:
    """Return what `python setup.py ...` prints; fail the test if it fails."""
    done = start_setup(*arguments, package=package, **environment)
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def start_setup(
    *arguments: str, package: Path = PACKAGE, **environment: str
) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=package,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def skip_without_compiler() -> None:
    if not shutil.which(cpp_extension.get_cxx_compiler()):
        pytest.skip(f"there is no C++ compiler ({cpp_extension.get_cxx_compiler()})")


def build_library(folder: Path, **environment: str) -> str:
    """Compile into `folder/rpe_ops/_C*.so`, in one minute or, with CUDA, two; return the output."""
    return run_setup(
        *("build_ext", "--build-lib", str(folder), "--build-temp", str(folder / "objects")),
        **environment,
    )


def provide_library() -> None:
    """Load the compiled operators; build them first if no installed library fits this checkout.

    A build is kept in torch's folder for extensions and found there by the next session.
    """
    if not library.load_library():
        return
    skip_without_compiler()
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    root.mkdir(parents=True, exist_ok=True)
    version = library.source_fingerprint(PACKAGE)[:16]
    folder = root / f"rpe_ops-{version}-torch{torch.__version__}"
    with filelock.FileLock(f"{folder}.lock"):
        if not list(folder.glob("rpe_ops/_C*")):
            build_library(folder)
    sys.path.append(str(folder))
    forget_library()
    assert library.load_library() == ""


def forget_library() -> None:
    """Search for the library again at the next use."""
    library._loaded.cache_clear()
    implementations._reason_against.cache_clear()
