"""Masks from the segmentations of a COCO annotation file, decoded with pycocotools."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from datasets.errors import DataError

__all__ = ["decode_masks"]


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
