"""The transforms of `datasets.transforms` to bytes, for batches that the device normalizes.

Evaluation has the values of the transform to floats after `normalize_pixels`, to the last bit.
Training draws the same crops, flips and operations from the same random numbers. It resizes the
random crop with torch instead of Pillow, in a quarter of the time: a few pixels differ, by one or
two of 255 levels. Shear and translation are those of `datasets.shifts`. The random erasing is only
drawn here, see `datasets.pixels.erase`.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import MaybeToTensor, RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision import transforms
from torchvision.transforms.v2 import functional as F

from datasets.decoders import Decode, DecoderName, find_decoder
from datasets.pixels import DrawErasing, Erasing, pack, to_image, to_uint8
from datasets.shifts import shift_faster
from datasets.transforms import build_transform

__all__ = ["build_byte_transform"]

_ON_FLOATS = (MaybeToTensor, transforms.ToTensor, transforms.Normalize, RandomErasing)


def build_byte_transform(
    is_train: bool, *, decoder: DecoderName = "pillow", **options: Any
) -> transforms.Compose:
    """Build the transform from a PIL RGB image to bytes.

    Args:
        is_train: True for the random transform of training, False for that of evaluation.
        decoder: Decoder of JPEG files, see `datasets.decoders`; used if the transform begins with a
            random resized crop.
        **options: The other arguments of `build_transform`.

    Returns:
        The transform. For evaluation its result is a uint8 tensor (3, H, W), for training a pair of
        this tensor and the list of rectangles to erase.

    Raises:
        ValueError: An argument is not one of the allowed values.
        DataError: The decoder is not installed.
    """
    steps = build_transform(is_train, **options).transforms
    on_images = [step for step in steps if not isinstance(step, _ON_FLOATS)]
    if not is_train:
        return transforms.Compose([*on_images, to_uint8])
    on_images = [
        _ResizedCrop(step) if isinstance(step, RandomResizedCropAndInterpolation) else step
        for step in on_images
    ]
    for step in on_images:
        shift_faster(step)
    draws = [
        DrawErasing(step.probability, step.max_count)
        for step in steps
        if isinstance(step, RandomErasing)
    ]
    steps = [*on_images, _Finish(*draws)]
    if isinstance(steps[0], _ResizedCrop):
        return _DecodingTransform(steps, find_decoder(decoder))
    return transforms.Compose(steps)


class _DecodingTransform(transforms.Compose):
    """Steps that begin with a crop, and the decoder of the image files.

    Args:
        steps: The steps. The first one accepts PIL images and pixels uint8 `(3, H, W)`.
        decode: Decoder of the image files.
    """

    def __init__(self, steps: Sequence[Callable], decode: Decode) -> None:
        super().__init__(steps)
        self.decode = decode


class _ResizedCrop:
    """timm's random resized crop, resized by torch.

    Args:
        crop: The transform of timm.
    """

    def __init__(self, crop: RandomResizedCropAndInterpolation) -> None:
        self.crop = crop

    def __call__(self, image: Image.Image | Tensor) -> Image.Image:
        """Crop a random rectangle of an image or its pixels `(3, H, W)`, and resize it."""
        crop = self.crop
        top, left, height, width = crop.get_params(image, crop.scale, crop.ratio)
        interpolation = crop.interpolation
        if isinstance(interpolation, tuple | list):
            interpolation = random.choice(interpolation)
        cropped = F.crop(image, top, left, height, width)
        # torch resizes dense memory (H, W, 3) in the least time.
        pixels = pack(cropped) if isinstance(cropped, Tensor) else to_uint8(cropped)
        return to_image(F.resize(pixels, list(crop.size), interpolation=interpolation))


class _Finish:
    """The end of the training transform: conversion to bytes, and the draw of the erasing.

    Args:
        draw: Random erasing; None for none.
    """

    def __init__(self, draw: DrawErasing | None = None) -> None:
        self.draw = draw

    def __call__(self, image: Image.Image) -> tuple[Tensor, list[Erasing]]:
        """Return the pixels uint8 `(3, H, W)` and the rectangles to erase."""
        return to_uint8(image), self.draw(image.height, image.width) if self.draw else []
