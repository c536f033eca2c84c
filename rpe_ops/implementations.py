"""Which implementation of the operators runs, and why the others do not.

A choice is `"auto"` or one of `IMPLEMENTATIONS`. `"auto"` takes the first that can run on the
device; an explicit choice that cannot run raises with the reason and never falls back.
"""

from collections.abc import Callable

import torch

from rpe_ops import reference

__all__ = ["IMPLEMENTATIONS", "available_implementations", "can_run", "resolve", "load"]

# Fastest first: the order in which "auto" tries them.
IMPLEMENTATIONS = ("cuda", "triton", "cpp", "reference")

_NOT_IN_THIS_RELEASE = "this release of rpe_ops has no {name} operators"


def _reason_against(name: str, device: torch.device) -> str:
    """Why `name` cannot run on `device`; empty when it can."""
    if name == "reference":
        return ""
    return _NOT_IN_THIS_RELEASE.format(name=name)


def can_run(name: str, device: torch.device | str, *, raise_error: bool = False) -> bool:
    """Whether an implementation can run on a device.

    Args:
        name: One of `IMPLEMENTATIONS`.
        device: Where the tensors are.
        raise_error: Raise instead of answering False.

    Raises:
        ValueError: `name` is unknown.
        RuntimeError: With `raise_error`, the reason why it cannot run.
    """
    if name not in IMPLEMENTATIONS:
        allowed = ", ".join(("auto", *IMPLEMENTATIONS))
        raise ValueError(f"unknown rpe_ops implementation {name!r}: choose one of {allowed}")
    device = torch.device(device)
    reason = _reason_against(name, device)
    if reason and raise_error:
        raise RuntimeError(f"rpe_ops implementation {name!r} cannot run on {device.type}: {reason}")
    return not reason


def available_implementations(device: torch.device | str) -> dict[str, str]:
    """Every implementation with the reason why it cannot run on `device`, empty when it can."""
    return {name: _reason_against(name, torch.device(device)) for name in IMPLEMENTATIONS}


def resolve(choice: str, device: torch.device) -> str:
    """Turn a choice into the name of an implementation that runs on `device`.

    Raises:
        ValueError: The choice is unknown.
        RuntimeError: An explicit choice cannot run here; says why.
    """
    if choice != "auto":
        can_run(choice, device, raise_error=True)
        return choice
    return next(name for name in IMPLEMENTATIONS if can_run(name, device))


def load(name: str) -> tuple[Callable, Callable]:
    """The `(gather, bucket_sum)` functions of an implementation that `resolve` named."""
    assert name == "reference", name
    return reference.gather, reference.bucket_sum
