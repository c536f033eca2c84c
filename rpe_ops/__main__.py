"""Command `python -m rpe_ops`: print what this installation can run, and why not the rest."""

import importlib
import platform

import torch

from rpe_ops import library
from rpe_ops.implementations import available_implementations, resolve

# Gather and bucket sum always come together.
_OPERATORS = {"gather": "gather and bucket sum", "attention": "attention"}


def _triton_version() -> str:
    """Return the version of Triton, or why it cannot be imported."""
    try:
        return importlib.import_module("triton").__version__
    except ImportError as error:
        return f"cannot be imported: {error}"


def _gpu() -> str:
    """Return the names and compute capabilities of all GPUs."""
    if not torch.cuda.is_available():
        return "none visible to torch"
    names = []
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        names.append(f"{torch.cuda.get_device_name(i)} (compute capability {major}.{minor})")
    return ", ".join(names)


def versions() -> dict[str, str]:
    """Return the versions and paths that the operators run with, by name."""
    reason = library.load_library()
    kernels = "CPU and CUDA" if library.has_cuda_kernels() else "CPU"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "torch is built without CUDA",
        "gpu": _gpu(),
        "triton": _triton_version(),
        "package": str(library.PACKAGE),
        "library": f"none: {reason}" if reason else f"{library.library_path()} ({kernels})",
    }


def report() -> str:
    """Return the versions, then every implementation of every operator on the CPU and on CUDA."""
    lines = [f"{name:8} {version}" for name, version in versions().items()]
    for device in ("cpu", "cuda"):
        for operator, title in _OPERATORS.items():
            missing = device == "cuda" and not torch.cuda.is_available()
            chosen = "none" if missing else resolve("auto", torch.device(device), operator)
            lines += ["", f"{title} on {device}, auto is {chosen}:"]
            otherwise = "no GPU is visible to torch" if missing else "can run"
            reasons = available_implementations(device, operator)
            lines += [f"  {name:10} {reason or otherwise}" for name, reason in reasons.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
