"""RandAugment on the device: workers draw the operations, the device applies them to a batch.

A worker calls the policy of timm on a recorder instead of an image, so operations and strengths are
those that it would apply, from the same random numbers. The device applies each kind of operation
to all images that drew it. Pixels are those of Pillow, but for affine transforms, where few values
are one of 255 levels away.
"""

import math
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from PIL import Image
from timm.data import auto_augment
from timm.data.auto_augment import RandAugment
from torch import Tensor
from torch.nn.functional import avg_pool2d
from torchvision.transforms.v2 import functional as F

__all__ = ["Operation", "apply_operations", "draw_operations", "record_operations"]


class Operation(NamedTuple):
    """One drawn operation.

    Attributes:
        kind: Key of `_KINDS`.
        numbers: Its numbers, if it has any: the 256 values of a lookup table, a strength, or for an
            affine transform the six numbers of Pillow's matrix, 1 for bicubic or 0 for bilinear
            interpolation, and the fill color.
    """

    kind: str
    numbers: tuple[float, ...] = ()


class _Recorder(NamedTuple):
    """What a policy gets instead of an image."""

    width: int
    height: int
    operations: tuple[Operation, ...] = ()

    def add(self, operation: Operation) -> "_Recorder":
        """Return a recorder with one more operation."""
        return self._replace(operations=(*self.operations, operation))


def record_operations(policy: Any) -> None:
    """Let the operations of a policy record themselves instead of changing an image.

    Args:
        policy: A RandAugment of timm, which is changed.

    Raises:
        ValueError: It is another policy, or has an operation that the device does not have.
    """
    if not isinstance(policy, RandAugment):
        name = type(policy).__name__
        raise ValueError(f"augment_on must be cpu for policies other than RandAugment, got {name}")
    for op in policy.ops:
        function = auto_augment.NAME_TO_OP[op.name]
        if function in _MATRICES:
            op.aug_fn = partial(_record_affine, _MATRICES[function])
        elif function in _PLAIN:
            op.aug_fn = partial(_record_plain, _PLAIN[function])
        elif function in _ON_VALUES:
            op.aug_fn = partial(_record_table, op.aug_fn)
        else:
            raise ValueError(f"augment_on must be cpu for a policy with {op.name}, got device")


def draw_operations(policy: RandAugment, height: int, width: int) -> list[Operation]:
    """Draw the operations for an image of `height` x `width` pixels.

    Args:
        policy: A policy that was given to `record_operations`.
        height: Height of the image.
        width: Width of the image.
    """
    return list(policy(_Recorder(width, height)).operations)


def apply_operations(images: Tensor, operations: Sequence[Sequence[Operation]]) -> Tensor:
    """Apply the drawn operations to a batch in place, without waiting for the device.

    Args:
        images: Images uint8 `(B, 3, H, W)`, with any strides.
        operations: The operations of each image, in their order.

    Returns:
        The images.
    """
    for place in range(max(map(len, operations), default=0)):
        groups: dict[str, list[tuple[int, tuple[float, ...]]]] = {}
        for row, drawn in enumerate(operations):
            if place < len(drawn):
                groups.setdefault(drawn[place].kind, []).append((row, drawn[place].numbers))
        for kind, members in groups.items():
            rows = torch.tensor([row for row, _ in members]).to(images.device, non_blocking=True)
            numbers = torch.tensor([values for _, values in members])
            numbers = numbers.to(images.device, non_blocking=True)
            images[rows] = _KINDS[kind](images[rows].contiguous(), numbers)
    return images


def _record_affine(
    matrix: Callable[[float, int, int], tuple[float, ...]],
    image: _Recorder,
    level: float,
    *,
    fillcolor: tuple[int, int, int],
    resample: Any,
) -> _Recorder:
    """Record an affine transform."""
    if isinstance(resample, (list, tuple)):
        resample = random.choice(resample)
    is_cubic = float(resample == Image.Resampling.BICUBIC)
    numbers = (*matrix(level, image.width, image.height), is_cubic, *fillcolor)
    return image.add(Operation("affine", numbers))


def _record_plain(kind: str, image: _Recorder, *levels: float, **unused: object) -> _Recorder:
    """Record an operation with its strength, if it has one."""
    return image.add(Operation(kind, levels))


def _record_table(
    function: Callable[..., Image.Image], image: _Recorder, *levels: float, **options: object
) -> _Recorder:
    """Record an operation on single values by its results for all of them."""
    ramp = Image.frombytes("RGB", (256, 1), bytes(value for value in range(256) for _ in range(3)))
    return image.add(Operation("table", tuple(function(ramp, *levels, **options).tobytes()[::3])))


def _rotation(degrees: float, width: int, height: int) -> tuple[float, ...]:
    """Return the matrix of Pillow's `rotate`."""
    angle = -math.radians(degrees % 360)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    x, y = width / 2, height / 2
    return cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y


# The matrix (a, b, c, d, e, f) maps the center (x, y) of a pixel to (a x + b y + c, d x + e y + f).
_MATRICES: dict[Callable, Callable[[float, int, int], tuple[float, ...]]] = {
    auto_augment.shear_x: lambda level, width, height: (1, level, 0, 0, 1, 0),
    auto_augment.shear_y: lambda level, width, height: (1, 0, 0, level, 1, 0),
    auto_augment.translate_x_rel: lambda level, width, height: (1, 0, level * width, 0, 1, 0),
    auto_augment.translate_y_rel: lambda level, width, height: (1, 0, 0, 0, 1, level * height),
    auto_augment.translate_x_abs: lambda level, width, height: (1, 0, level, 0, 1, 0),
    auto_augment.translate_y_abs: lambda level, width, height: (1, 0, 0, 0, 1, level),
    auto_augment.rotate: _rotation,
}
_PLAIN = {
    auto_augment.color: "color",
    auto_augment.contrast: "contrast",
    auto_augment.sharpness: "sharpness",
    auto_augment.auto_contrast: "auto_contrast",
    auto_augment.equalize: "equalize",
}
_ON_VALUES = {
    auto_augment.invert,
    auto_augment.posterize,
    auto_augment.solarize,
    auto_augment.solarize_add,
    auto_augment.brightness,
}


def _affine(images: Tensor, numbers: Tensor) -> Tensor:
    """Transform images `(n, 3, H, W)` by matrices, interpolations and colors `(n, 10)`."""
    _, channels, height, width = images.shape
    a, b, c, d, e, f, is_cubic = (column[:, None, None] for column in numbers[:, :7].unbind(1))
    x = torch.arange(width, device=images.device) + 0.5
    y = torch.arange(height, device=images.device)[:, None] + 0.5
    source_x, source_y = a * x + b * y + c, d * x + e * y + f
    is_inside = (source_x >= 0) & (source_x < width) & (source_y >= 0) & (source_y < height)
    columns, weights_x = _taps(source_x, is_cubic, width)
    rows, weights_y = _taps(source_y, is_cubic, height)
    pixels = images.flatten(2).float()
    result = torch.zeros_like(pixels)
    for row, weight_y in zip(rows, weights_y, strict=True):
        for column, weight_x in zip(columns, weights_x, strict=True):
            index = (row * width + column).flatten(1)[:, None].expand(-1, channels, -1)
            weight = (weight_y * weight_x).flatten(1)[:, None]
            result.addcmul_(pixels.gather(2, index), weight)
    result = result.clamp_(0, 255).to(torch.uint8).view_as(images)
    fill = numbers[:, 7:, None, None].to(torch.uint8)
    return torch.where(is_inside[:, None], result, fill)


def _taps(source: Tensor, is_cubic: Tensor, size: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return the positions of the four nearest pixels along an axis, and their weights."""
    first = (source - 0.5).floor()
    d = source - 0.5 - first
    positions = [(first.long() + tap).clamp_(0, size - 1) for tap in (-1, 0, 1, 2)]
    # The cubic convolution of Pillow has a = -1.
    cubic = (d * (-1 + d * (2 - d)), 1 + d * d * (d - 2), d * (1 + d * (1 - d)), d * d * (d - 1))
    linear = (torch.zeros_like(d), 1 - d, d, torch.zeros_like(d))
    weights = [torch.where(is_cubic > 0, *pair) for pair in zip(cubic, linear, strict=True)]
    return positions, weights


def _table(images: Tensor, tables: Tensor) -> Tensor:
    """Replace the values of images `(n, 3, H, W)` by those of their tables `(n, 256)`."""
    tables = tables.to(torch.uint8)
    return tables.gather(1, images.flatten(1).long()).view_as(images)


def _blend(images: Tensor, degenerate: Tensor, strengths: Tensor) -> Tensor:
    """Move images from degenerate ones by strengths `(n, 1)`: 0 is degenerate, 1 the image."""
    moved = degenerate + strengths[:, :, None, None] * (images - degenerate)
    return moved.clamp_(0, 255).to(torch.uint8)


def _gray(images: Tensor) -> Tensor:
    """Return the gray values `(n, 1, H, W)` of images, int32, rounded as in Pillow."""
    red, green, blue = images.int().unbind(1)
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000 >> 16)[:, None]


def _color(images: Tensor, strengths: Tensor) -> Tensor:
    """Change the saturation."""
    return _blend(images, _gray(images).float(), strengths)


def _contrast(images: Tensor, strengths: Tensor) -> Tensor:
    """Change the contrast around the mean gray value."""
    mean = _gray(images).double().mean((1, 2, 3), keepdim=True)
    return _blend(images, (mean + 0.5).floor().float(), strengths)


def _sharpness(images: Tensor, strengths: Tensor) -> Tensor:
    """Change the sharpness; the border of one pixel stays, as in Pillow."""
    smooth = images.float()
    if min(images.shape[2:]) >= 3:
        center = smooth[:, :, 1:-1, 1:-1]
        total = avg_pool2d(smooth, 3, stride=1, divisor_override=1) + 4 * center
        smooth[:, :, 1:-1, 1:-1] = (total / 13 + 0.5).floor()
    return _blend(images, smooth, strengths)


def _auto_contrast(images: Tensor, _: Tensor) -> Tensor:
    """Stretch the values of each channel to 0 to 255, in float64 as Pillow."""
    low = images.amin((2, 3), keepdim=True).double()
    high = images.amax((2, 3), keepdim=True).double()
    # `255 / x` of torch multiplies by the rounded reciprocal.
    scale = torch.full_like(high, 255) / (high - low).clamp_(min=1)
    stretched = (images * scale - low * scale).clamp_(0, 255).to(torch.uint8)
    return torch.where(high > low, stretched, images)


_KINDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "affine": _affine,
    "table": _table,
    "color": _color,
    "contrast": _contrast,
    "sharpness": _sharpness,
    "auto_contrast": _auto_contrast,
    "equalize": lambda images, _: F.equalize(images),
}
