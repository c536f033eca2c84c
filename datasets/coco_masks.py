"""Masks from the segmentations of a COCO annotation file, decoded with pycocotools."""

import json
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from datasets.errors import DataError

__all__ = ["decode_masks", "rle_problem"]


def decode_masks(segmentations: Sequence[str], height: int, width: int) -> Tensor:
    """Decode segmentations to masks.

    Args:
        segmentations: List of n segmentations as JSON, each a list of polygons or an RLE
            (run-length encoding) with a string or a list of counts. Polygons with fewer than three
            corners are ignored.
        height: Height of the image in pixels.
        width: Width of the image in pixels.

    Returns:
        Masks (n, height, width) bool.

    Raises:
        DataError: An RLE is damaged, or its size is not that of the image.
    """
    masks = np.zeros((len(segmentations), height, width), dtype=bool)
    for mask, text in zip(masks, segmentations, strict=True):
        rle = _to_rle(json.loads(text), height, width)
        if rle is not None:
            mask[:] = coco_mask.decode(rle)
    return torch.from_numpy(masks)


def rle_problem(rle: Mapping[str, Any]) -> str:
    """Describe the first problem of an RLE, which pycocotools would decode without a check.

    Args:
        rle: `size` (height and width in pixels) and `counts`, a list or a compressed string.

    Returns:
        The description; an empty string if there is no problem.
    """
    size, counts = rle["size"], rle["counts"]
    if not (isinstance(size, list) and len(size) == 2 and all(map(_is_whole, size))):
        return f"RLE size must be the height and width in pixels, got {reprlib.repr(size)}"
    runs = counts if isinstance(counts, list) else _runs_of(counts)
    if runs is None or not all(map(_is_whole, runs)):
        shown = reprlib.repr(counts)
        return f"RLE counts must be lengths of runs, or a string that encodes them, got {shown}"
    if sum(runs) != size[0] * size[1]:
        return (
            f"RLE counts must add up to {size[0] * size[1]} pixels for size {size}, got {sum(runs)}"
        )
    return ""


def _is_whole(number: Any) -> bool:
    """Return whether an entry is an integer of at least 0."""
    return type(number) is int and number >= 0


def _runs_of(text: Any) -> list[int] | None:
    """Return the lengths of runs that a compressed RLE encodes; None if it is damaged.

    A character has five bits of a number and a bit that says whether more follow. From the fourth
    number on, the difference to the number two places before is stored.
    """
    if not isinstance(text, str):
        return None
    runs: list[int] = []
    number = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            return None
        number |= (bits & 0x1F) << shift
        shift += 5
        if not bits & 0x20:
            if bits & 0x10:
                number -= 1 << shift
            runs.append(number + runs[-2] if len(runs) > 2 else number)
            number = shift = 0
    return runs if shift == 0 else None


def _to_rle(segmentation: Any, height: int, width: int) -> dict[str, Any] | None:
    """Convert a segmentation to one compressed RLE; None for an empty mask."""
    if isinstance(segmentation, list):
        polygons = [polygon for polygon in segmentation if len(polygon) >= 6]
        if not polygons:
            return None
        return coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
    size, counts = segmentation["size"], segmentation["counts"]
    if list(size) != [height, width]:
        raise DataError(f"RLE size must be {[height, width]} as the image, got {size}")
    if isinstance(counts, list):
        if sum(counts) != height * width:
            raise DataError(
                f"RLE counts must add up to {height * width} pixels for size {size}, "
                f"got {sum(counts)}"
            )
        return coco_mask.frPyObjects(segmentation, height, width)
    return segmentation
