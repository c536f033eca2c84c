"""Segmentations of a COCO annotation file as masks, through pycocotools."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from datasets.errors import DataError


def decode_masks(segmentations: Sequence[str], height: int, width: int) -> Tensor:
    """Draws segmentations.

    Args:
        segmentations: n segmentations as JSON: polygons, or RLE with a string or a list of counts.
            Polygons of fewer than three corners cover nothing.
        height: Rows of the image.
        width: Columns of the image.

    Returns:
        (n, height, width) bool.

    Raises:
        DataError: An RLE is damaged or of another size than the image.
    """
    masks = np.zeros((len(segmentations), height, width), dtype=bool)
    for mask, text in zip(masks, segmentations, strict=True):
        runs = _runs(json.loads(text), height, width)
        if runs is not None:
            mask[:] = coco_mask.decode(runs)
    return torch.from_numpy(masks)


def _runs(shape: Any, height: int, width: int) -> dict[str, Any] | None:
    """A segmentation as one compressed RLE; None where it covers nothing."""
    if isinstance(shape, list):
        polygons = [part for part in shape if len(part) >= 6]
        if not polygons:
            return None
        return coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
    if list(shape["size"]) != [height, width]:
        raise DataError(f"an RLE of size {shape['size']} is of an image of {[height, width]}")
    if isinstance(shape["counts"], list):
        if sum(shape["counts"]) != height * width:
            raise DataError(f"an RLE does not add up to its size {shape['size']}")
        return coco_mask.frPyObjects(shape, height, width)
    return shape
