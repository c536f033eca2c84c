"""Pictures of objects: boxes and masks in a color per class, with names and scores."""

import colorsys
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from detection.detections import Detections
from engine.pictures import label_font

__all__ = ["color_of", "draw", "draw_objects"]

# Smaller images are enlarged, so that text in them can be read.
_MIN_SIDE = 300
_GOLDEN_RATIO = 0.618034


def draw(image: Tensor | Image.Image, detections: Detections) -> Image.Image:
    """Draw detections into a copy of their image.

    An image with sides below 300 pixels is enlarged by a whole factor.

    Args:
        image: PIL RGB image, or tensor (3, H, W) uint8.
        detections: Detections in the image.

    Returns:
        The picture.
    """
    if isinstance(image, Image.Image):
        image = TF.pil_to_tensor(image.convert("RGB"))
    factor = max(1, math.ceil(_MIN_SIDE / max(image.shape[-2:])))
    if factor > 1:
        image = TF.resize(image, [factor * side for side in image.shape[-2:]])
    rows = zip(detections.classes, detections.scores.tolist(), strict=True)
    texts = [f"{name} {score:.2f}" for name, score in rows]
    labels = detections.labels.tolist()
    boxes = detections.boxes * factor
    return TF.to_pil_image(draw_objects(image, boxes, texts, labels, detections.masks))


def draw_objects(
    pixels: Tensor,
    boxes: Tensor,
    texts: Sequence[str],
    labels: Sequence[int],
    masks: Tensor | None = None,
) -> Tensor:
    """Draw objects into a copy of a picture; line width and font size grow with the picture.

    Args:
        pixels: Picture uint8 `(3, H, W)`.
        boxes: Boxes `(n, 4)` as (x1, y1, x2, y2) in its pixels, the most certain object first.
        texts: Text of each box.
        labels: Label of each box, which gives its color.
        masks: Masks `(n, h, w)` bool of any size; None for none.

    Returns:
        The new picture uint8 `(3, H, W)`.

    Raises:
        UserError: matplotlib, which has the font, is not installed.
    """
    if not len(boxes):
        return pixels
    height, width = pixels.shape[-2:]
    colors = [color_of(label) for label in labels]
    if masks is not None:
        if masks.shape[-2:] != pixels.shape[-2:]:
            masks = F.interpolate(masks[:, None].float(), (height, width))[:, 0] > 0.5
        pixels = draw_segmentation_masks(pixels, _without_overlap(masks), alpha=0.5, colors=colors)
    limits = torch.tensor([width, height, width, height]) - 1
    boxes = boxes.clamp(min=0).minimum(limits)
    scale = math.sqrt(height * width)
    line = max(2, round(scale / 250))
    # The most certain object is drawn last, over the others.
    pixels = draw_bounding_boxes(pixels, boxes.flip(0), colors=colors[::-1], width=line)
    picture = TF.to_pil_image(pixels)
    _write_texts(picture, boxes, texts, colors, max(14, round(scale / 35)))
    return TF.pil_to_tensor(picture)


def _without_overlap(masks: Tensor) -> Tensor:
    """Give each pixel to the first of its masks; torchvision draws shared pixels in black."""
    taken = torch.zeros_like(masks[0])
    separate = []
    for mask in masks:
        separate.append(mask & ~taken)
        taken = taken | mask
    return torch.stack(separate)


def _write_texts(
    picture: Image.Image,
    boxes: Tensor,
    texts: Sequence[str],
    colors: Sequence[tuple[int, int, int]],
    size: int,
) -> None:
    """Write texts above the boxes, or inside where the picture ends."""
    font = label_font(size)
    pen = ImageDraw.Draw(picture)
    rows = zip(boxes.tolist(), texts, colors, strict=True)
    for (left, top, _, _), text, color in reversed(list(rows)):
        text = f" {text} "
        width, height = pen.textlength(text, font), 1.25 * size
        left = max(0, min(left, picture.width - width))
        top = max(0, top - height)
        pen.rectangle((left, top, left + width, top + height), fill=color)
        pen.text((left, top + height / 2), text, _text_color(color), font, anchor="lm")


def color_of(label: int) -> tuple[int, int, int]:
    """Return the color of a class, as far as possible from those of the classes before."""
    hue = (label * _GOLDEN_RATIO) % 1
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.85, (1.0, 0.75)[label // 8 % 2])
    return round(255 * red), round(255 * green), round(255 * blue)


def _text_color(color: tuple[int, int, int]) -> str:
    """Return black or white, whichever has the better contrast to a color."""
    red, green, blue = color
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 128 else "white"
