"""Boxes: conversion, and the generalized IoU of all pairs.

    GIoU = IoU - (area(hull) - area(union)) / area(hull)

The hull is the smallest box around both boxes. Two boxes of zero area at the same place give 0/0,
which is nan. Unlike in torchvision, a box with reversed corners is an error.

Source: Rezatofighi et al., CVPR 2019.
"""

import torchvision
from torch import Tensor
from torchvision.ops import box_convert

__all__ = ["cxcywh_to_xyxy", "xyxy_to_cxcywh", "pairwise_giou"]


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Convert boxes `(..., 4)` from center and size to corners."""
    return box_convert(boxes, "cxcywh", "xyxy")


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Convert boxes `(..., 4)` from corners to center and size."""
    return box_convert(boxes, "xyxy", "cxcywh")


def pairwise_giou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Compute the generalized IoU of every pair of boxes.

    Args:
        boxes1: Corners `(N, 4)`. Corners that are nan give nan.
        boxes2: Corners `(M, 4)`.

    Returns:
        Values `(N, M)` in [-1, 1].

    Raises:
        ValueError: The corners of a box are reversed.
    """
    _check_corners(boxes1, "boxes1")
    _check_corners(boxes2, "boxes2")
    return torchvision.ops.generalized_box_iou(boxes1, boxes2)


def _check_corners(boxes: Tensor, name: str) -> None:
    """Raise ValueError if the corners of a box are reversed."""
    reversed_ = (boxes[:, 2:] < boxes[:, :2]).any(1)
    if reversed_.any():
        index = int(reversed_.nonzero()[0])
        raise ValueError(
            f"{name}[{index}] must be (x1, y1, x2, y2) with x1 <= x2 and y1 <= y2, "
            f"got {boxes[index].tolist()}"
        )
