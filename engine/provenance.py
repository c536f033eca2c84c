"""The revision, versions and hardware that a result was computed with."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["machine", "provenance"]


def provenance() -> dict[str, str | None]:
    """Return the git revision and the versions of Python, torch and CUDA.

    Host and user names are left out.

    Returns:
        `git` (with `-dirty` if there are uncommitted changes; None outside of a repository or
        without git), `python`, `torch` and `cuda` (None if torch is built without CUDA).
    """
    import torch

    return {
        "git": _git_revision(Path(__file__).parent),
        "python": platform.python_version(),
        "torch": _torch_version(),
        "cuda": torch.version.cuda,
    }


def machine(device: torch.device | str = "cpu") -> dict[str, str | int | None]:
    """Return the hardware and the versions that a time was measured with.

    Args:
        device: Device that computes.

    Returns:
        `device` (name of the GPU or of the processor), `threads` (of torch on the CPU), `python`,
        `torch` and `timm` (None if it is not installed).
    """
    import torch

    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": _torch_version(),
        "timm": _version_of("timm"),
    }


def _cpu_name(info: Path = Path("/proc/cpuinfo")) -> str:
    """Return the name of the processor, or of its architecture if it is unknown."""
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def _torch_version() -> str:
    """Return torch's version as a plain string, which safe loaders of checkpoints accept."""
    import torch

    return str(torch.__version__)


def _version_of(distribution: str) -> str | None:
    """Return the version of an installed distribution, None if it is missing."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_revision(folder: Path) -> str | None:
    """Return the revision of the repository around a folder, None if there is none."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
    # Without tags, `describe` returns the revision itself and not its distance from a tag.
    command += ["--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
