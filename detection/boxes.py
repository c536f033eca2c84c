"""Boxes: conversion, and the generalized IoU.

    GIoU = IoU - (area(hull) - area(union)) / area(hull)

The hull is the smallest box around both boxes. Two boxes of zero area at the same place give 0/0,
which is nan.

Source: Rezatofighi et al., CVPR 2019.
"""

import torch
from torch import Tensor
from torchvision.ops import box_convert

__all__ = ["cxcywh_to_xyxy", "xyxy_to_cxcywh", "generalized_iou"]


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Convert boxes `(..., 4)` from center and size to corners."""
    return box_convert(boxes, "cxcywh", "xyxy")


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Convert boxes `(..., 4)` from corners to center and size."""
    return box_convert(boxes, "xyxy", "cxcywh")


def generalized_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Compute the generalized IoU of two boxes, for tensors of boxes that broadcast.

    `generalized_iou(a[:, None], b)` compares all pairs. The functions of torchvision accept no more
    than one dimension of boxes, and its loss waits for the GPU.

    Args:
        boxes1: Corners `(..., 4)`, not reversed. Corners that are nan give nan.
        boxes2: Corners `(..., 4)`, not reversed.

    Returns:
        Values `(...)` in [-1, 1].
    """
    (low1, high1), (low2, high2) = (boxes.split(2, -1) for boxes in (boxes1, boxes2))
    overlap = _area((torch.min(high1, high2) - torch.max(low1, low2)).clamp(min=0))
    union = _area(high1 - low1) + _area(high2 - low2) - overlap
    hull = _area(torch.max(high1, high2) - torch.min(low1, low2))
    return overlap / union - (hull - union) / hull


def _area(size: Tensor) -> Tensor:
    """Return width times height of sizes `(..., 2)`."""
    width, height = size.unbind(-1)
    return width * height
