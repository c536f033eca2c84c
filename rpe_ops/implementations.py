"""Which implementation of an operator runs, and why the others do not.

A choice is `"auto"` or one of `IMPLEMENTATIONS`. `"auto"` takes the first that can run on the
device; an explicit choice that cannot run raises with the reason and never falls back.
"""

import functools
import importlib
import os
from types import ModuleType

import torch

from rpe_ops import library

__all__ = [
    "IMPLEMENTATIONS",
    "OPERATORS",
    "ImplementationError",
    "available_implementations",
    "can_run",
    "resolve",
    "reason_against_input",
    "load",
]

# Fastest first: the order in which "auto" tries them.
IMPLEMENTATIONS = ("cuda", "triton", "cpp", "reference")
OPERATORS = ("gather", "bucket_sum", "attention")

_MODULES = {
    "cuda": "rpe_ops.library",
    "triton": "rpe_ops.triton_kernels",
    "cpp": "rpe_ops.library",
    "reference": "rpe_ops.reference",
}
# Older GPUs have no bfloat16.
_TRITON_CAPABILITY = (8, 0)
_TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_TRITON_HEAD_DIM = 128


class ImplementationError(RuntimeError):
    """An implementation that was asked for by name cannot run here."""


def can_run(
    name: str, device: torch.device | str, *, operator: str = "gather", raise_error: bool = False
) -> bool:
    """Whether an implementation of an operator can run on a device.

    Args:
        name: One of `IMPLEMENTATIONS`.
        device: Where the tensors are.
        operator: One of `OPERATORS`.
        raise_error: Raise instead of answering False.

    Raises:
        ValueError: `name` or `operator` is unknown.
        ImplementationError: With `raise_error`, the reason why it cannot run.
    """
    for value, allowed, what in (
        (name, IMPLEMENTATIONS, "implementation"),
        (operator, OPERATORS, "operator"),
    ):
        if value not in allowed:
            listed = ", ".join(("auto",) * (what == "implementation") + allowed)
            raise ValueError(f"unknown rpe_ops {what} {value!r}: choose one of {listed}")
    device = torch.device(device)
    reason = _reason_against(name, device.type, operator)
    if reason and raise_error:
        raise ImplementationError(
            f"rpe_ops implementation {name!r} of {operator} cannot run on {device.type}: {reason}"
        )
    return not reason


def available_implementations(
    device: torch.device | str, operator: str = "gather"
) -> dict[str, str]:
    """Every implementation with the reason why it cannot run on `device`, empty when it can."""
    device = torch.device(device)
    return {name: _reason_against(name, device.type, operator) for name in IMPLEMENTATIONS}


def resolve(choice: str, device: torch.device, operator: str = "gather") -> str:
    """Turn a choice into the name of an implementation that runs on `device`.

    Raises:
        ValueError: The choice is unknown.
        ImplementationError: An explicit choice cannot run here; says why.
    """
    return _resolve(choice, device.type, operator)


def reason_against_input(name: str, q: torch.Tensor) -> str:
    """Why an implementation of attention that runs here does not take `q`; empty when it does."""
    if name != "triton":
        return ""
    if q.dtype not in _TRITON_DTYPES:
        return f"Triton's attention takes float16, bfloat16 and float32, got {q.dtype}"
    if q.shape[-1] > _TRITON_HEAD_DIM:
        return f"Triton's attention takes head dims up to {_TRITON_HEAD_DIM}, got {q.shape[-1]}"
    return ""


@functools.cache
def load(name: str) -> ModuleType:
    """The module with the functions of an implementation that `resolve` named."""
    return importlib.import_module(_MODULES[name])


def _resolve(choice: str, device_type: str, operator: str) -> str:
    if choice != "auto":
        can_run(choice, device_type, operator=operator, raise_error=True)
        return choice
    for name in IMPLEMENTATIONS:
        # Triton's interpreter is for tests: never chosen unasked.
        interpreted = name == "triton" and device_type == "cpu"
        if not interpreted and not _reason_against(name, device_type, operator):
            return name
    raise AssertionError("the reference runs everywhere")


# A compiler sees the answer alone. This is all that torch.compiler.assume_constant_result does, but
# that would import the compiler for everybody.
_resolve._dynamo_marked_constant = True


@functools.cache
def _reason_against(name: str, device_type: str, operator: str) -> str:
    """Why `name` cannot run; empty when it can."""
    if name == "reference":
        return ""
    if name == "triton":
        return _reason_against_triton(device_type)
    only = "cuda" if name == "cuda" else "cpu"
    if device_type != only:
        return f"it runs on {only} tensors"
    if name == "cuda" and operator == "attention":
        return "fused attention on CUDA is written in Triton"
    if name == "cpp":
        return library.load_library()
    return library.reason_without_cuda() or _reason_without_gpu()


def _reason_without_gpu() -> str:
    return "" if torch.cuda.is_available() else "no GPU is visible to torch"


def _reason_against_triton(device_type: str) -> str:
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "" if device_type in ("cpu", "cuda") else "it runs on cuda tensors"
    if device_type != "cuda":
        return "it runs on cuda tensors (on the CPU only with TRITON_INTERPRET=1, slowly)"
    if reason := _reason_without_gpu():
        return reason
    capability = torch.cuda.get_device_capability()
    if capability < _TRITON_CAPABILITY:
        return "it needs a GPU of compute capability 8.0, this one has {}.{}".format(*capability)
    return ""
