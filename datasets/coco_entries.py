"""The check of one annotation of a COCO file, which has one box and one segmentation."""

import math
from collections.abc import Mapping
from typing import Any

from datasets.coco_masks import rle_problem

__all__ = ["area_of", "find_problem"]

_LARGEST_COORDINATE = 100_000  # pixels


def find_problem(entry: Mapping[str, Any], names: Mapping[int, str], with_masks: bool) -> str:
    """Describe the first problem of an annotation that stops a training.

    Args:
        entry: One of `annotations`.
        names: Name of each category id.
        with_masks: Check the segmentation, too.

    Returns:
        The description; an empty string if there is no problem.
    """
    box = entry.get("bbox")
    if not (isinstance(box, list) and len(box) == 4 and _finite(box)):
        return f"bbox must be four finite numbers (x, y, width, height), got {box}"
    if entry.get("category_id") not in names:
        category = entry.get("category_id")
        return f"category_id must be a category that the file lists, got {category!r}"
    if entry.get("iscrowd", 0) not in (0, 1):
        return f"iscrowd must be 0 or 1, got {entry['iscrowd']!r}"
    if not with_masks:
        return ""
    segmentation = entry.get("segmentation")
    if not segmentation:
        # The region of a crowd may be its box.
        crowd = entry.get("iscrowd", 0)
        return "" if crowd else "segmentation is missing or empty, needed for masks"
    if isinstance(segmentation, dict):
        complete = {"counts", "size"} <= set(segmentation)
        return rle_problem(segmentation) if complete else "RLE segmentation lacks counts or size"
    if isinstance(segmentation, list) and all(map(_is_polygon, segmentation)):
        return ""
    return (
        "segmentation must be polygons of finite numbers, at most "
        f"{_LARGEST_COORDINATE:,}, or an RLE"
    )


def _is_polygon(part: Any) -> bool:
    """Return whether a part of a segmentation is a list of finite numbers.

    The memory of a drawn polygon grows with its coordinates, not with the image.
    """
    return (
        isinstance(part, list)
        and _finite(part)
        and all(abs(number) <= _LARGEST_COORDINATE for number in part)
    )


def _finite(numbers: list[Any]) -> bool:
    """Return whether all entries are finite numbers."""
    try:
        return math.isfinite(math.fsum(numbers))
    except (TypeError, ValueError, OverflowError):
        return False


def area_of(entry: Mapping[str, Any]) -> float:
    """Return the area of an annotation; that of its box if it is missing or not finite."""
    area = entry.get("area")
    if _finite([area]):
        return float(area)
    return float(entry["bbox"][2]) * float(entry["bbox"][3])
