"""The transforms of `datasets.transforms` to bytes, for batches that the device normalizes.

Evaluation has the values of the transform to floats after `normalize_pixels`, to the last bit.
Training draws the same crops, flips and operations from the same random numbers. It resizes the
random crop with torch instead of Pillow, in a quarter of the time: a few pixels differ, by one or
two of 255 levels. Shear and translation are those of `datasets.shifts`. The random erasing is only
drawn here, see `datasets.pixels.erase`; so are the operations of RandAugment if the device applies
them, see `datasets.device_augment`.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any, Literal

from PIL import Image
from timm.data.auto_augment import AugMixAugment, AutoAugment, RandAugment
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import MaybeToTensor, RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision import transforms
from torchvision.transforms.v2 import functional as F

from datasets.decoders import Decode, DecoderName, find_decoder
from datasets.device_augment import Operation, draw_operations, record_operations
from datasets.pixels import DrawErasing, Erasing, pack, to_image, to_uint8
from datasets.shifts import shift_faster
from datasets.transforms import build_transform

__all__ = ["AugmentOn", "build_byte_transform"]

AugmentOn = Literal["cpu", "device"]

_POLICIES = (AugMixAugment, AutoAugment, RandAugment)
_ON_FLOATS = (MaybeToTensor, transforms.ToTensor, transforms.Normalize, RandomErasing)


def build_byte_transform(
    is_train: bool,
    *,
    decoder: DecoderName = "pillow",
    augment_on: AugmentOn = "cpu",
    **options: Any,
) -> transforms.Compose:
    """Build the transform from a PIL RGB image to bytes.

    Args:
        is_train: True for the random transform of training, False for that of evaluation.
        decoder: Decoder of JPEG files, see `datasets.decoders`; used if the transform begins with a
            random resized crop.
        augment_on: `device` only draws the operations of RandAugment.
        **options: The other arguments of `build_transform`.

    Returns:
        The transform. For evaluation its result is a uint8 tensor (3, H, W), for training this
        tensor, the list of rectangles to erase, and the list of operations for the device.

    Raises:
        ValueError: An argument is not one of the allowed values, or the device does not have an
            operation of `aa`.
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
    policy = None
    if augment_on == "device" and options.get("augment", "recipe") == "recipe":
        policy = next((step for step in on_images if isinstance(step, _POLICIES)), None)
    if policy is not None:
        record_operations(policy)
        on_images.remove(policy)
    for step in on_images:
        shift_faster(step)
    draw = next(
        (
            DrawErasing(step.probability, step.max_count)
            for step in steps
            if isinstance(step, RandomErasing)
        ),
        None,
    )
    steps = [*on_images, _Finish(draw, policy)]
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
    """The end of the training transform: conversion to bytes, and the draws for the device.

    Args:
        draw: Random erasing; None for none.
        policy: RandAugment that the device applies; None for none.
    """

    def __init__(self, draw: DrawErasing | None, policy: RandAugment | None) -> None:
        self.draw = draw
        self.policy = policy

    def __call__(self, image: Image.Image) -> tuple[Tensor, list[Erasing], list[Operation]]:
        """Return the pixels uint8 `(3, H, W)`, the rectangles to erase and the operations."""
        size = image.height, image.width
        operations = draw_operations(self.policy, *size) if self.policy else []
        return to_uint8(image), self.draw(*size) if self.draw else [], operations
