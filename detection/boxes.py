"""Boxes: conversion, and generalised IoU of all pairs, with a check that torchvision leaves out.

Generalised IoU (Rezatofighi et al., CVPR 2019): IoU - (area(hull) - area(union)) / area(hull),
where the hull is the smallest box around both. Two boxes without any area in the same place give
0/0, which is nan; a box whose corners are reversed is an error.
"""

import torchvision
from torch import Tensor
from torchvision.ops import box_convert

__all__ = ["cxcywh_to_xyxy", "xyxy_to_cxcywh", "pairwise_giou"]


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Convert boxes `(..., 4)` from centre and size to corners."""
    return box_convert(boxes, "cxcywh", "xyxy")


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Convert boxes `(..., 4)` from corners to centre and size."""
    return box_convert(boxes, "xyxy", "cxcywh")


def pairwise_giou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Compute the generalised IoU of every box with every other.

    Args:
        boxes1: Corners `(N, 4)`; those that are nan pass the check and give nan.
        boxes2: Corners `(M, 4)`.

    Returns:
        `(N, M)`, in [-1, 1].

    Raises:
        ValueError: The corners of a box are reversed.
    """
    _check_corners(boxes1, "boxes1")
    _check_corners(boxes2, "boxes2")
    return torchvision.ops.generalized_box_iou(boxes1, boxes2)


def _check_corners(boxes: Tensor, name: str) -> None:
    reversed_ = (boxes[:, 2:] < boxes[:, :2]).any(1)
    if reversed_.any():
        index = int(reversed_.nonzero()[0])
        raise ValueError(
            f"{name}[{index}] is {boxes[index].tolist()} but should be (x1, y1, x2, y2) "
            "with x1 <= x2 and y1 <= y2"
        )
