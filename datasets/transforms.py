"""Image transforms of the DeiT recipe, built with timm.

Training: random resized crop, flip, RandAugment, random erasing. Evaluation: resize to 256/224 of
the input size, center crop. As in DeiT, inputs of at most 32 pixels (CIFAR, digits) get a random
crop with a padding of 4 pixels instead of the random resized crop, and evaluation does not crop
them. Two things differ from DeiT: small images of another size are first resized to the input size,
and the input size may be a rectangle.
"""

from collections.abc import Sequence
from typing import Any, Literal

from PIL import Image, ImageOps
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from torchvision import transforms
from torchvision.transforms import InterpolationMode

__all__ = ["Augment", "allow_zero_bits", "build_transform", "eval_settings"]

Augment = Literal["recipe", "affine", "none"]

_SMALL = 32
_POLICY = "rand-m9-mstd0.5-inc1"
_AUGMENTS = ("recipe", "affine", "none")
_INTERPOLATIONS = ("bicubic", "bilinear", "random")
_ERASING_MODES = ("pixel", "rand", "const")


def build_transform(
    is_train: bool,
    *,
    input_size: int | tuple[int, int] = 224,
    augment: Augment = "recipe",
    color_jitter: float = 0.4,
    aa: str | None = _POLICY,
    train_interpolation: str = "bicubic",
    reprob: float = 0.25,
    remode: str = "pixel",
    recount: int = 1,
) -> transforms.Compose:
    """Build the transform from a PIL RGB image to a normalized float tensor (3, H, W).

    Args:
        is_train: True for the random transform of training, False for that of evaluation.
        input_size: Side, or (height, width), in pixels.
        augment: Augmentation for training. `recipe` is that of DeiT. `affine` resizes the image
            without a crop, then rotates it by at most 12 degrees, scales it by at most 15 % and
            shifts it by at most 7.5 %; it suits small images such as digits. `none` is the
            evaluation transform. Pass the same value for evaluation: after `affine`, evaluation
            does not crop either.
        color_jitter: Strength of the color jitter; without effect if `aa` is given.
        aa: Name of a RandAugment or AutoAugment policy in timm, or None.
        train_interpolation: `bicubic`, `bilinear` or `random` (one of the two for each image).
        reprob: Probability of random erasing.
        remode: Content of an erased rectangle: `pixel`, `rand` or `const`.
        recount: Number of erased rectangles.

    Returns:
        The transform.

    Raises:
        ValueError: An argument is not one of the allowed values.
    """
    _check("augment", augment, _AUGMENTS)
    _check("train_interpolation", train_interpolation, _INTERPOLATIONS)
    _check("remode", remode, _ERASING_MODES)
    size = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"input_size must be a side or (height, width) > 0, got {input_size}")

    without_crop = _without_crop(size, augment)
    if not is_train or augment == "none":
        return create_transform(**eval_settings(size, augment))
    if augment == "affine":
        return _affine(size)
    try:
        recipe = create_transform(
            input_size=size,
            is_training=True,
            color_jitter=color_jitter,
            auto_augment=aa,
            interpolation=train_interpolation,
            re_prob=reprob,
            re_mode=remode,
            re_count=recount,
        )
    except (AssertionError, ValueError) as error:
        # timm checks the name of a policy with assertions.
        raise ValueError(
            f"aa and color_jitter must be accepted by timm, got aa {aa!r}, "
            f"color_jitter {color_jitter}: {error}"
        ) from error
    allow_zero_bits(recipe)
    if without_crop:
        crop = [_resize(size), transforms.RandomCrop(size, padding=4)]
        recipe = transforms.Compose(crop + recipe.transforms[1:])
    return recipe


def allow_zero_bits(recipe: transforms.Compose) -> None:
    """Let timm's posterize keep 0 bits, which gives a black image, with every version of Pillow.

    The recipe uses 0 bits at the end of its range, which Pillow 13 rejects.
    """
    for step in recipe.transforms:
        for op in getattr(step, "ops", []):
            if op.name.startswith("Posterize"):
                op.aug_fn = _posterize


def _posterize(image: Image.Image, bits: int, **unused: object) -> Image.Image:
    """Keep the highest `bits` bits of each channel."""
    if bits < 1:
        return Image.new(image.mode, image.size)
    return ImageOps.posterize(image, min(bits, 8))


def eval_settings(input_size: tuple[int, int], augment: Augment = "recipe") -> dict[str, Any]:
    """Return the arguments of `timm.data.create_transform` that give the evaluation transform.

    They are plain values, which checkpoints and exported files record.

    Args:
        input_size: Height and width in pixels.
        augment: Augmentation for training, see `build_transform`.
    """
    without_crop = _without_crop(input_size, augment)
    return {
        "input_size": [3, *input_size],
        "interpolation": "bicubic",
        "crop_pct": 1.0 if without_crop else 224 / 256,
        "crop_mode": "squash" if without_crop else "center",
        "mean": list(IMAGENET_DEFAULT_MEAN),
        "std": list(IMAGENET_DEFAULT_STD),
    }


def _without_crop(size: tuple[int, int], augment: Augment) -> bool:
    """Return whether evaluation resizes images to exactly the input size."""
    return augment == "affine" or max(size) <= _SMALL


def _affine(size: tuple[int, int]) -> transforms.Compose:
    """Build the training transform for `augment="affine"`."""
    affine = transforms.RandomAffine(
        degrees=12,
        translate=(0.075, 0.075),
        scale=(0.85, 1.15),
        interpolation=InterpolationMode.BILINEAR,
    )
    return transforms.Compose([_resize(size), affine, *_to_tensor()])


def _resize(size: tuple[int, int]) -> transforms.Resize:
    """Build a resize to exactly (height, width)."""
    return transforms.Resize(size, interpolation=InterpolationMode.BICUBIC)


def _to_tensor() -> list[object]:
    """Build the last steps: conversion to a tensor and normalization."""
    return [
        transforms.ToTensor(),
        transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    ]


def _check(name: str, value: str, allowed: Sequence[str]) -> None:
    """Raise `ValueError` if a value is not allowed."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
