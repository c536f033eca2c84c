"""Checks of single values in a checkpoint, with the key of the culprit in the message."""

import math
import reprlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from engine.errors import UserError

__all__ = [
    "is_finite",
    "is_number",
    "is_numbers",
    "is_real",
    "is_whole",
    "require_that",
    "same_count",
    "same_kind",
]


def require_that(condition: bool, key: str, wanted: Any, found: Any) -> None:
    """Raise UserError unless a condition on an entry of the checkpoint is met."""
    if not condition:
        # The value is foreign and may be of any size.
        shown = found if isinstance(found, str) else reprlib.repr(found)
        raise UserError(
            f"the checkpoint cannot resume this training: {key} must be {wanted}, got {shown:.200}"
        )


def same_kind(key: str, value: Any, own: Any) -> None:
    """Check that a value is of the kind of the value that it replaces."""
    if own is None or isinstance(own, bool):
        plain = value is None or isinstance(value, bool)
        if own is None:
            plain = plain or isinstance(value, str) or is_real(value) or is_numbers(value)
        require_that(plain, key, "true, false or none", value)
    elif is_number(own):
        fits = is_number(value) and (math.isfinite(value) or not math.isfinite(own))
        require_that(fits and not math.isnan(value), key, "a finite number", value)
    elif isinstance(own, str):
        require_that(isinstance(value, str), key, "a string", value)
    elif isinstance(own, (list, tuple)):
        require_that(isinstance(value, (list, tuple)), key, "a list", value)
        same_count(key, value, own)
        for i, (one, own_one) in enumerate(zip(value, own, strict=True)):
            if own_one is None:
                # Such as the functions of a LambdaLR, which have no state.
                require_that(one is None, f"{key}[{i}]", "none", one)
            else:
                same_kind(f"{key}[{i}]", one, own_one)
    else:
        require_that(type(value) is type(own), key, f"a {type(own).__name__}", value)


def same_count(key: str, found: Sequence[Any], own: Sequence[Any]) -> None:
    """Check that a list is as long as that of this training."""
    require_that(len(found) == len(own), key, f"{len(own)} entries", f"{len(found)}")


def is_whole(value: Any) -> bool:
    """Return whether a value is an integer and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Return whether a value is a number of 64 bits and not a bool."""
    return isinstance(value, float) or (is_whole(value) and abs(value) < 2**63)


def is_real(value: Any) -> bool:
    """Return whether a value is a finite number, a bool or a tensor of one finite number."""
    if isinstance(value, Tensor):
        return value.ndim == 0 and not value.is_complex() and is_finite(value)
    return isinstance(value, bool) or (is_number(value) and math.isfinite(value))


def is_numbers(value: Any) -> bool:
    """Return whether a value is a list or tuple of numbers."""
    return isinstance(value, (list, tuple)) and all(map(is_number, value))


def is_finite(tensor: Tensor) -> bool:
    """Return whether all entries of a tensor are finite; false for a sparse or complex tensor.

    A sum reads the tensor once and allocates nothing. If it is not finite, which may also be an
    overflow, each entry is checked.
    """
    if tensor.is_complex() or tensor.layout != torch.strided:
        return False
    if not tensor.is_floating_point():
        return True
    if tensor.element_size() == 1:
        tensor = tensor.float()  # float8 has no sum
    return math.isfinite(tensor.sum(dtype=torch.float32).item()) or bool(tensor.isfinite().all())
