"""Batches of images of different sizes for DETR, padded by workers and normalized on the device."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from datasets.pixels import normalize_pixels

__all__ = ["collate", "normalize_batch"]


def collate(samples: Sequence[tuple[Tensor, Any]]) -> tuple[Tensor, Tensor, list[Any]]:
    """Build a batch: pad images at the right and the bottom to the largest height and width.

    Args:
        samples: B pairs of an image (3, h, w), all uint8 or all normalized, and a target.

    Returns:
        Three items: the images (B, 3, height, width), 0 in the padding; the padding mask
        (B, height, width) bool, True in the padding; the list of targets. Images in uint8 are in
        memory as (B, height, width, 3).
    """
    images, targets = zip(*samples, strict=True)
    height = max(image.shape[1] for image in images)
    width = max(image.shape[2] for image in images)
    count, channels = len(images), images[0].shape[0]
    if images[0].dtype == torch.uint8:
        batch = images[0].new_zeros(count, height, width, channels).permute(0, 3, 1, 2)
    else:
        batch = images[0].new_zeros(count, channels, height, width)
    mask = torch.ones(count, height, width, dtype=torch.bool)
    for i, image in enumerate(images):
        batch[i, :, : image.shape[1], : image.shape[2]] = image
        mask[i, : image.shape[1], : image.shape[2]] = False
    return batch, mask, list(targets)


def normalize_batch(images: Tensor, mask: Tensor) -> Tensor:
    """Normalize the images of a batch of `collate`, with 0 in the padding.

    Args:
        images: Images (B, 3, height, width); if they are not uint8, they are normalized already and
            returned unchanged.
        mask: Padding mask (B, height, width).
    """
    if images.is_floating_point():
        return images
    return normalize_pixels(images, reciprocal=True).masked_fill_(mask[:, None], 0)
