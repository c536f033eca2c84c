"""The check of the entries of a checkpoint that describe its labels and images.

They become the classes of a data set, the rows of a table and names in pictures, so a value of
another kind would fail far from its cause.
"""

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from irpe_core.errors import CheckpointError

__all__ = ["check_entries"]

# More labels or pixels than any model has; a list with an entry for each still fits in memory.
_MOST_LABELS = 1_000_000
_MOST_PIXELS = 100_000


def check_entries(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Check the entries that describe labels, images and the choices of attention, if they exist.

    Args:
        checkpoint: Content of the file.
        path: The file, for the message.

    Raises:
        CheckpointError: An entry is of another kind. The message names it.
    """
    is_detector = checkpoint.get("label_to_category") is not None
    checks = {
        "task": (lambda value: isinstance(value, str), "a string"),
        # Categories of a detector are distinguished by id and may have the same name.
        "classes": (
            lambda value: _are_names(value) and (is_detector or len(set(value)) == len(value)),
            "a list of different strings",
        ),
        "label_to_category": (_is_label_map, f"a dict of labels below {_MOST_LABELS:,} and ids"),
        "image_size": (_is_size, "one or two numbers of pixels"),
        "attention_choices": (_are_choices, "a dict of dicts"),
    }
    for name, (is_valid, wanted) in checks.items():
        value = checkpoint.get(name)
        if value is not None and not is_valid(value):
            raise CheckpointError(
                f"{name!r} of {str(path)!r} must be {wanted}, got {reprlib.repr(value)}"
            )


def _are_names(value: Any) -> bool:
    """Return whether a value is a list of strings."""
    return isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value)


def _is_label_map(value: Any) -> bool:
    """Return whether a value is a dict of labels and category ids, both whole numbers."""
    return isinstance(value, dict) and all(
        type(label) is int
        and type(category) is int
        and 0 <= label < _MOST_LABELS
        and abs(category) < 2**63
        for label, category in value.items()
    )


def _are_choices(value: Any) -> bool:
    """Return whether a value maps environments to choices, which are checked when they are used."""
    return isinstance(value, dict) and all(isinstance(found, dict) for found in value.values())


def _is_size(value: Any) -> bool:
    """Return whether a value is a number of pixels, or height and width."""
    sides = value if isinstance(value, (list, tuple)) else [value]
    return 1 <= len(sides) <= 2 and all(
        type(side) is int and 0 < side <= _MOST_PIXELS for side in sides
    )
