"""Image transforms of DETR (Carion et al. 2020, section 4 and appendix A.4).

Training: random horizontal flip; with probability 0.5 a resize of the short side to 400, 500 or 600
and a random crop with sides of 384 to 600; then a resize of the short side to one of 480, 512, ...,
800, the long side at most 1333. Evaluation: short side 800, long side at most 1333.

The functions accept PIL images and tensors of pixels; boxes are plain tensors. One thing differs
from DETR: the random numbers are drawn in another order.

The trainer uses the transforms to bytes (`normalize=False`), and the device normalizes the batch.
Evaluation has the same values as with `normalize`, to the last bit. Training resizes with torch
instead of Pillow, in about a fifth of the time. A few pixels differ, by one or two of 255 levels.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision.ops import box_convert
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from datasets.decoders import Decode, DecoderName, find_decoder
from datasets.images import decode_rgb
from datasets.pixels import pack, to_uint8

__all__ = [
    "Picture",
    "Target",
    "Sample",
    "EvalTransform",
    "TrainTransform",
    "build_coco_transforms",
    "short_side_size",
    "resize_short_side",
    "resize",
    "resize_image",
    "crop",
    "flip",
    "normalize",
    "normalize_boxes",
    "normalize_image",
]

Target = dict[str, Tensor]
Picture = Image.Image | Tensor
"""A PIL RGB image, or its pixels uint8 `(3, h, w)`."""

Sample = tuple[Picture, Target]

_SCALES = tuple(range(480, 801, 32))
_CROP_SCALES = (400, 500, 600)
_CROP_SIDES = (384, 600)
_EVAL_SIZE = 800
_MAX_SIZE = 1333
_PER_OBJECT = ("boxes", "labels", "area", "iscrowd", "masks")


@dataclass(frozen=True)
class EvalTransform:
    """The transform for evaluation: resize and normalize.

    Attributes:
        size: Length of the short side in pixels.
        max_size: Largest length of the long side in pixels.
        normalize: Return normalized floats instead of bytes.
    """

    size: int
    max_size: int
    normalize: bool = True

    def __call__(self, image: Image.Image, target: Target) -> tuple[Tensor, Target]:
        """Transform an image and its target."""
        image, target = resize_short_side(image, target, self.size, self.max_size)
        finish = normalize_image if self.normalize else to_uint8
        return finish(image), normalize_boxes(image, target)

    def transform_image(self, image: Image.Image) -> Tensor:
        """Transform an image without a target to a tensor `(3, h, w)`."""
        size = short_side_size(image.height, image.width, self.size, self.max_size)
        return normalize_image(resize_image(image, *size))

    def settings(self) -> dict[str, Any]:
        """Return the transform as plain values, which checkpoints and exported files record."""
        return {
            "shortest_edge": self.size,
            "longest_edge": self.max_size,
            "interpolation": "bilinear",
            "mean": list(IMAGENET_DEFAULT_MEAN),
            "std": list(IMAGENET_DEFAULT_STD),
        }


@dataclass(frozen=True)
class TrainTransform:
    """The transform for training: random flip, crop and resize, then normalize.

    Attributes:
        scales: Possible lengths of the short side in pixels.
        max_size: Largest length of the long side in pixels.
        crop_scales: Possible lengths of the short side before a crop, in pixels.
        crop_sides: Smallest and largest side of a crop in pixels.
        normalize: Return normalized floats instead of bytes.
        decode: Decoder of the image files, which gives a picture; only for bytes.
    """

    scales: tuple[int, ...]
    max_size: int
    crop_scales: tuple[int, ...]
    crop_sides: tuple[int, int]
    normalize: bool = True
    decode: Decode = decode_rgb

    def __call__(self, image: Picture, target: Target) -> tuple[Tensor, Target]:
        """Transform an image and its target."""
        if not self.normalize:
            pixels = image if isinstance(image, Tensor) else to_uint8(image)
            return self._augment(pixels, target)
        image, target = self._augment(image, target)
        return normalize_image(image), target

    def _augment(self, image: Picture, target: Target) -> Sample:
        """Flip, crop and resize an image, and normalize its boxes."""
        if random.random() < 0.5:
            image, target = flip(image, target)
        if random.random() < 0.5:
            image, target = resize_short_side(image, target, random.choice(self.crop_scales))
            image, target = self._crop(image, target)
        scale = random.choice(self.scales)
        image, target = resize_short_side(image, target, scale, self.max_size)
        return image, normalize_boxes(image, target)

    def _crop(self, image: Picture, target: Target) -> Sample:
        """Crop a random rectangle."""
        smallest, largest = self.crop_sides
        full_height, full_width = F.get_size(image)
        width = random.randint(min(smallest, full_width), min(largest, full_width))
        height = random.randint(min(smallest, full_height), min(largest, full_height))
        top = random.randint(0, full_height - height)
        left = random.randint(0, full_width - width)
        return crop(image, target, top, left, height, width)


def build_coco_transforms(
    split: Literal["train", "val"],
    *,
    max_size: int = _MAX_SIZE,
    scales: Sequence[int] = _SCALES,
    eval_size: int = _EVAL_SIZE,
    augment: Literal["recipe", "none"] = "recipe",
    image_size: int | None = None,
    normalize: bool = True,
    decoder: DecoderName = "pillow",
) -> Callable[[Image.Image, Target], tuple[Tensor, Target]]:
    """Build the transform from (PIL RGB image, target) to (normalized float (3, h, w), target).

    With `normalize=False` the image is uint8 (3, h, w), for batches that
    `datasets.coco_batches.normalize_batch` normalizes on the device.

    Args:
        split: `train`, or `val` for evaluation.
        max_size: Largest length of the long side in pixels.
        scales: Possible lengths of the short side in training, in pixels.
        eval_size: Length of the short side in evaluation, in pixels.
        augment: Augmentation for training: `recipe` is that of DETR, `none` the evaluation
            transform.
        image_size: Length of the short side in evaluation, instead of `eval_size`. All other sizes
            of the recipe are scaled by the same factor. For data sets of small images.
        normalize: Return normalized floats instead of bytes.
        decoder: Decoder of JPEG files for training to bytes, see `datasets.decoders`.

    Returns:
        The transform.

    Raises:
        ValueError: An argument is not one of the allowed values.
        DataError: The decoder is not installed.
    """
    if split not in ("train", "val"):
        raise ValueError(f"split must be train or val, got {split!r}")
    if augment not in ("recipe", "none"):
        raise ValueError(f"augment must be recipe or none, got {augment!r}")
    factor = 1.0
    if image_size is not None:
        if image_size < 1:
            raise ValueError(f"image_size must be at least 1 pixel, got {image_size}")
        factor, eval_size = image_size / eval_size, image_size
        max_size, scales = round(max_size * factor), [round(scale * factor) for scale in scales]
    sizes = {"max_size": max_size, "eval_size": eval_size, "scales": min(scales, default=0)}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1 pixel, got {size}")
    if split == "val" or augment == "none":
        return EvalTransform(eval_size, max_size, normalize)
    return TrainTransform(
        scales=tuple(scales),
        max_size=max_size,
        crop_scales=tuple(max(1, round(scale * factor)) for scale in _CROP_SCALES),
        crop_sides=(max(1, round(_CROP_SIDES[0] * factor)), max(1, round(_CROP_SIDES[1] * factor))),
        normalize=normalize,
        decode=decode_rgb if normalize else find_decoder(decoder),
    )


def short_side_size(
    height: int, width: int, size: int, max_size: int | None = None
) -> tuple[int, int]:
    """Return the (height, width) of a resize to a short side that keeps the aspect ratio.

    Args:
        height: Height of the image in pixels.
        width: Width of the image in pixels.
        size: Length of the short side after the resize, in pixels.
        max_size: Largest length of the long side in pixels; where necessary, the short side is
            smaller than `size`. None for no limit.
    """
    short, long = min(height, width), max(height, width)
    if max_size is not None and long / short * size > max_size:
        size = max(1, round(max_size * short / long))
    return (size, size * width // height) if height < width else (size * height // width, size)


def resize_short_side(
    image: Picture, target: Target, size: int, max_size: int | None = None
) -> Sample:
    """Resize an image and its target to the size given by `short_side_size`."""
    return resize(image, target, *short_side_size(*F.get_size(image), size, max_size))


def resize(image: Picture, target: Target, height: int, width: int) -> Sample:
    """Resize an image (bilinear) and its target (masks nearest) to (height, width)."""
    old_height, old_width = F.get_size(image)
    x, y = width / old_width, height / old_height
    target = target | {
        "boxes": target["boxes"] * torch.tensor([x, y, x, y]),
        "area": target["area"] * (x * y),
        "size": torch.tensor([height, width]),
    }
    if "masks" in target and (height, width) != (old_height, old_width):
        target["masks"] = F.resize(
            target["masks"], [height, width], interpolation=InterpolationMode.NEAREST
        )
    return resize_image(image, height, width), target


def resize_image(image: Picture, height: int, width: int) -> Picture:
    """Resize an image (bilinear) to (height, width)."""
    if [height, width] == F.get_size(image):
        return image
    if isinstance(image, Tensor):
        # A crop is a view. From dense memory (h, w, 3), torch returns the same order, which
        # `collate` copies without a transposition.
        image = pack(image)
    return F.resize(image, [height, width])


def crop(image: Picture, target: Target, top: int, left: int, height: int, width: int) -> Sample:
    """Crop an image and its target; objects whose box has no area left are dropped."""
    boxes = target["boxes"] - torch.tensor([left, top, left, top])
    boxes[:, 0::2].clamp_(min=0, max=width)
    boxes[:, 1::2].clamp_(min=0, max=height)
    sides = boxes[:, 2:] - boxes[:, :2]
    target = target | {
        "boxes": boxes,
        "area": sides.prod(dim=1),
        "size": torch.tensor([height, width]),
    }
    if "masks" in target:
        target["masks"] = F.crop(target["masks"], top, left, height, width)
    kept = (sides > 0).all(dim=1)
    target |= {name: target[name][kept] for name in _PER_OBJECT if name in target}
    return F.crop(image, top, left, height, width), target


def flip(image: Picture, target: Target) -> Sample:
    """Flip an image and its target horizontally."""
    x0, y0, x1, y1 = target["boxes"].unbind(dim=1)
    width = F.get_size(image)[1]
    boxes = torch.stack([width - x1, y0, width - x0, y1], dim=1)
    target = target | {"boxes": boxes}
    if "masks" in target:
        target["masks"] = F.horizontal_flip(target["masks"])
    return F.horizontal_flip(image), target


def normalize(image: Image.Image, target: Target) -> tuple[Tensor, Target]:
    """Convert to a tensor normalized as for ImageNet, and boxes to cx, cy, w, h in [0, 1]."""
    return normalize_image(image), normalize_boxes(image, target)


def normalize_boxes(image: Picture, target: Target) -> Target:
    """Return the target with boxes cx, cy, w, h in [0, 1]."""
    height, width = F.get_size(image)
    boxes = box_convert(target["boxes"], "xyxy", "cxcywh")
    return target | {"boxes": boxes / torch.tensor([width, height, width, height])}


def normalize_image(image: Image.Image) -> Tensor:
    """Convert an image to a tensor `(3, h, w)` normalized as for ImageNet."""
    tensor = F.to_dtype(F.to_image(image), torch.float32, scale=True).as_subclass(Tensor)
    return F.normalize(tensor, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
