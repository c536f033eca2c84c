"""Images as bytes: workers deliver uint8, and the device normalizes and erases whole batches.

A uint8 image has a quarter of the bytes of a float32 one, so workers copy less, and a batch reaches
the GPU sooner. Training and evaluation share these functions. The randomness stays with the
samples: a worker draws the rectangles to erase and the seed of their content.
"""

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

__all__ = [
    "DrawErasing",
    "Erasing",
    "ErasingMode",
    "collate_augmented",
    "collate_pixels",
    "erase",
    "normalize_pixels",
    "pack",
    "to_image",
    "to_uint8",
]

ErasingMode = Literal["pixel", "rand", "const"]

Erasing = tuple[int, int, int, int, int]
"""A rectangle to erase: top, left, height and width in pixels, and the seed of its content."""

# Smallest and largest fraction of the area, and the smallest aspect ratio, as in timm.
_AREAS = (0.02, 1 / 3)
_ASPECT = 0.3
_ATTEMPTS = 10


def to_uint8(image: Image.Image) -> Tensor:
    """Return the pixels of an RGB image: uint8 `(3, H, W)`, in memory as `(H, W, 3)`."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def pack(pixels: Tensor) -> Tensor:
    """Return an image `(3, H, W)` in dense memory as `(H, W, 3)`; a crop is copied."""
    return pixels.permute(1, 2, 0).contiguous().permute(2, 0, 1)


def to_image(pixels: Tensor) -> Image.Image:
    """Return the image of pixels uint8 `(3, H, W)`."""
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def normalize_pixels(images: Tensor, *, reciprocal: bool = False) -> Tensor:
    """Normalize a batch of images as for ImageNet.

    Each operation rounds as in the transforms of single images on the CPU, so the results are equal
    to the last bit on every device.

    Args:
        images: Images `(B, 3, H, W)` uint8, with any strides. Floating-point images are normalized
            already and returned unchanged.
        reciprocal: Multiply by 1/255, as in the second version of torchvision's transforms, instead
            of dividing by 255, as in the first. The last bit of the results differs.

    Returns:
        The images in float32, contiguous.
    """
    if images.is_floating_point():
        return images
    mean, std, largest = _constants(images.device)
    scaled = torch.empty(images.shape, dtype=torch.float32, device=images.device).copy_(images)
    scaled = scaled.mul_(1 / 255) if reciprocal else scaled.div_(largest)
    return scaled.sub_(mean).div_(std)


@lru_cache(maxsize=8)
def _constants(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean and standard deviation `(3, 1, 1)`, and 255, on a device."""
    # CUDA divides by a number of the host with a multiplication, which rounds differently. It
    # divides exactly by a tensor.
    with torch.inference_mode(mode=False):
        mean = torch.tensor(IMAGENET_DEFAULT_MEAN, device=device)[:, None, None]
        std = torch.tensor(IMAGENET_DEFAULT_STD, device=device)[:, None, None]
        return mean, std, torch.tensor(255.0, device=device)


@dataclass(frozen=True)
class DrawErasing:
    """Draw of random erasing (Zhong et al., 2020): which rectangles of an image to erase.

    From the same state of Python's generator, the rectangles are those of timm's `RandomErasing`.

    Attributes:
        probability: Probability that an image is erased at all.
        count: Largest number of rectangles.
    """

    probability: float
    count: int = 1

    def __call__(self, height: int, width: int) -> list[Erasing]:
        """Return the rectangles for an image of `height` x `width` pixels."""
        if not self.probability or random.random() > self.probability:
            return []
        count = self.count if self.count == 1 else random.randint(1, self.count)
        drawn = [self._rectangle(height, width, count) for _ in range(count)]
        return [(*found, random.getrandbits(63)) for found in drawn if found is not None]

    def _rectangle(self, height: int, width: int, count: int) -> tuple[int, int, int, int] | None:
        """Return one of `count` rectangles, or None if no attempt fits into the image."""
        log_aspect = -math.log(_ASPECT)
        for _ in range(_ATTEMPTS):
            area = random.uniform(*_AREAS) * height * width / count
            aspect = math.exp(random.uniform(-log_aspect, log_aspect))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h < height and w < width:
                return random.randint(0, height - h), random.randint(0, width - w), h, w
        return None


def erase(images: Tensor, erasings: Iterable[Sequence[Erasing]], mode: ErasingMode) -> Tensor:
    """Erase rectangles of normalized images in place, without waiting for the device.

    Args:
        images: Normalized images `(B, 3, H, W)`.
        erasings: The rectangles of each image.
        mode: Content: normal noise per `pixel`, one normal color (`rand`), or 0 (`const`).

    Returns:
        The images.
    """
    generator = torch.Generator(images.device)
    for image, rectangles in zip(images, erasings, strict=True):
        for top, left, height, width, seed in rectangles:
            area = image[:, top : top + height, left : left + width]
            if mode == "const":
                area.zero_()
                continue
            generator.manual_seed(seed)
            if mode == "pixel":
                area.normal_(generator=generator)
            else:
                area.copy_(area.new_empty(len(area), 1, 1).normal_(generator=generator))
    return images


def collate_pixels(samples: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    """Build a batch of images and class numbers.

    Args:
        samples: B pairs of pixels uint8 `(3, H, W)` and a class number.

    Returns:
        The images uint8 `(B, 3, H, W)`, in memory as `(B, H, W, 3)`, and the class numbers `(B,)`.
    """
    pixels, targets = zip(*samples, strict=True)
    count, (channels, height, width) = len(pixels), pixels[0].shape
    batch = torch.empty(count, height, width, channels, dtype=torch.uint8)
    torch.stack([image.permute(1, 2, 0) for image in pixels], out=batch)
    return batch.permute(0, 3, 1, 2), torch.tensor(targets)


def collate_augmented(
    samples: Sequence[tuple[tuple[Tensor, list[Erasing], list[Any]], int]],
) -> tuple[Tensor, Tensor, list[list[Erasing]], list[list[Any]]]:
    """Build a training batch.

    Args:
        samples: B pairs of a result of `build_byte_transform` and a class number.

    Returns:
        Images and class numbers as from `collate_pixels`, and for each image the rectangles to
        erase and the operations for `apply_operations`.
    """
    augmented, targets = zip(*samples, strict=True)
    pixels, erasings, operations = zip(*augmented, strict=True)
    batch = collate_pixels(list(zip(pixels, targets, strict=True)))
    return *batch, list(erasings), list(operations)
