"""Choice of the implementation of an operator, and the reasons why others cannot run.

A choice is `"auto"` or one of `IMPLEMENTATIONS`. `"auto"` is the first one that can run on the
device. A named implementation that cannot run raises an error with the reason; there is no silent
fallback.

An implementation of attention may have *variants*, different kernels for the same operator, such as
`"triton/rows"`. Without a variant it chooses the kernels by shape.
"""

import functools
import importlib
import os
from typing import Any

import torch

from rpe_ops import library

__all__ = [
    "IMPLEMENTATIONS",
    "OPERATORS",
    "VARIANTS",
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
VARIANTS = {"triton": ("flat", "flat_wide", "rows")}

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
    """Error for an implementation that was chosen by name and cannot run here.

    Attributes:
        exit_code: Exit code of a command that ends with this error, without a traceback.
    """

    exit_code = 1


def can_run(
    name: str, device: torch.device | str, *, operator: str = "gather", raise_error: bool = False
) -> bool:
    """Return whether an implementation of an operator can run on a device.

    Args:
        name: One of `IMPLEMENTATIONS`.
        device: Device of the tensors.
        operator: One of `OPERATORS`.
        raise_error: Raise an error instead of returning False.

    Raises:
        ValueError: `name` or `operator` is unknown.
        ImplementationError: It cannot run and `raise_error` is set; the message has the reason.
    """
    for value, allowed, what in (
        (name, IMPLEMENTATIONS, "implementation"),
        (operator, OPERATORS, "operator"),
    ):
        if value not in allowed:
            listed = ", ".join(("auto",) * (what == "implementation") + allowed)
            raise ValueError(f"rpe_ops {what} must be one of {listed}, got {value!r}")
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
    """Return every implementation with the reason why it cannot run; empty if it can run."""
    device = torch.device(device)
    return {name: _reason_against(name, device.type, operator) for name in IMPLEMENTATIONS}


def resolve(choice: str, device: torch.device, operator: str = "gather") -> str:
    """Return the name of the implementation that runs on `device` for a choice.

    Raises:
        ValueError: The choice is unknown.
        ImplementationError: The named implementation cannot run here; the message has the reason.
    """
    return _resolve(choice, device.type, operator)


def reason_against_input(name: str, q: torch.Tensor) -> str:
    """Return why an implementation of attention does not support `q`; empty if it does."""
    if name.partition("/")[0] != "triton":
        return ""
    if q.dtype not in _TRITON_DTYPES:
        return f"q must be float16, bfloat16 or float32 for Triton's attention, got {q.dtype}"
    if q.shape[-1] > _TRITON_HEAD_DIM:
        return (
            f"the head dim of q must be at most {_TRITON_HEAD_DIM} for Triton's attention, "
            f"got {q.shape[-1]}"
        )
    return ""


@functools.cache
def load(name: str) -> Any:
    """Return the functions of an implementation, a name returned by `resolve`."""
    name, _, variant = name.partition("/")
    module = importlib.import_module(_MODULES[name])
    return module.variant(variant) if variant else module


def _resolve(choice: str, device_type: str, operator: str) -> str:
    """Return what `resolve` returns, from the type of the device."""
    if choice != "auto":
        name, _, variant = choice.partition("/")
        can_run(name, device_type, operator=operator, raise_error=True)
        variants = VARIANTS.get(name, ()) if operator == "attention" else ()
        if variant and variant not in variants:
            listed = ", ".join(variants) or "none"
            raise ValueError(
                f"rpe_ops variant of {name}'s {operator} must be one of {listed}, got {variant!r}"
            )
        return choice
    for name in IMPLEMENTATIONS:
        # Triton's interpreter on the CPU is for tests, so "auto" never chooses it.
        interpreted = name == "triton" and device_type == "cpu"
        if not interpreted and not _reason_against(name, device_type, operator):
            return name
    raise AssertionError("the reference runs everywhere")


# torch.compile then uses the result as a constant. torch.compiler.assume_constant_result sets the
# same attribute, but it would import the compiler in every process.
_resolve._dynamo_marked_constant = True


@functools.cache
def _reason_against(name: str, device_type: str, operator: str) -> str:
    """Return why `name` cannot run; empty if it can."""
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
    """Return that there is no GPU; empty if there is one."""
    return "" if torch.cuda.is_available() else "no GPU is visible to torch"


def _reason_against_triton(device_type: str) -> str:
    """Return why Triton cannot run; empty if it can."""
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
