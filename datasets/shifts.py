"""Faster shear and translation for RandAugment: the operations of timm in a fraction of the time.

Pillow computes 16 weights for each pixel of an affine transform. Shear and translation along an
axis move each row (or column) by its own distance, so four weights per row are enough. Kernel, fill
color and borders are those of Pillow; a few pixels differ by one of 255 levels. Interpolations
other than bicubic are left to Pillow.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment
from torch import Tensor

__all__ = ["shift_faster", "shift_rows"]

Operation = Callable[..., Image.Image]


def shift_faster(step: Any) -> None:
    """Replace shear and translation in a RandAugment of timm; other steps stay as they are."""
    for op in getattr(step, "ops", []):
        op.aug_fn = _FASTER.get(op.aug_fn, op.aug_fn)


def shift_rows(pixels: Tensor, distances: Tensor, fill: int) -> Tensor:
    """Move each row to the left, with the bicubic interpolation of Pillow's affine transform.

    Args:
        pixels: Pixels of four bytes, `(H, W)` int32.
        distances: Distance of each row in pixels `(H,)` float64.
        fill: Pixel where the image has none.

    Returns:
        The moved pixels `(H, W)` int32.
    """
    width = pixels.shape[1]
    whole = distances.floor()
    d = (distances - whole).float()[:, None]
    # The weights of the cubic convolution with a = -1, at the distances 1 + d, d, 1 - d and 2 - d.
    weights = (d * (-1 + d * (2 - d)), 1 + d * d * (d - 2), d * (1 + d * (1 - d)), d * d * (d - 1))
    columns = torch.arange(-1, width + 2) + whole.long()[:, None]
    source = pixels.gather(1, columns.clamp_(0, width - 1)).view(torch.uint8).float()
    moved = source[:, : 4 * width] * weights[0]
    for tap in range(1, 4):
        moved.addcmul_(source[:, 4 * tap : 4 * (tap + width)], weights[tap])
    moved = moved.clamp_(0, 255).to(torch.uint8).view(torch.int32)
    centers = torch.arange(width) + (distances + 0.5)[:, None]
    return moved.masked_fill_((centers < 0) | (centers >= width), fill)


def _move(
    image: Image.Image,
    level: float,
    *,
    original: Operation,
    is_shear: bool,
    across: bool,
    **options: Any,
) -> Image.Image:
    """Move the rows, or across these the columns, as an operation of timm."""
    if options.get("resample") != Image.Resampling.BICUBIC:
        return original(image, level, **options)
    pixels = torch.from_numpy(np.array(image.convert("RGBX"))).view(torch.int32)[..., 0]
    pixels = pixels.t().contiguous() if across else pixels
    count, length = pixels.shape
    places = torch.arange(count, dtype=torch.float64) + 0.5
    distances = level * places if is_shear else torch.full_like(places, level * length)
    red, green, blue = options["fillcolor"]
    fill = int(np.array([red, green, blue, 0], dtype=np.uint8).view(np.int32)[0])
    moved = shift_rows(pixels, distances, fill)
    moved = moved.t().contiguous() if across else moved
    return Image.frombuffer("RGBX", image.size, moved.numpy(), "raw", "RGBX", 0, 1).convert("RGB")


_FASTER = {
    original: partial(_move, original=original, is_shear=is_shear, across=across)
    for original, is_shear, across in (
        (auto_augment.shear_x, True, False),
        (auto_augment.shear_y, True, True),
        (auto_augment.translate_x_rel, False, False),
        (auto_augment.translate_y_rel, False, True),
    )
}
