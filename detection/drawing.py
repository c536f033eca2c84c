"""Pictures of detections: boxes and masks in a color per class, with class names and scores."""

import colorsys
import math
from pathlib import Path

import matplotlib as mpl
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2 import functional as F
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from detection.predictor import Detections

__all__ = ["color_of", "draw"]

# Smaller images are enlarged, so that text in them can be read.
_MIN_SIDE = 300
_GOLDEN_RATIO = 0.618034


def draw(image: Tensor | Image.Image, detections: Detections) -> Image.Image:
    """Draw detections into a copy of their image.

    Line width and font size grow with the image. An image with sides below 300 pixels is enlarged
    by a whole factor.

    Args:
        image: PIL RGB image, or tensor (3, H, W) uint8.
        detections: Detections in the image.

    Returns:
        The picture.
    """
    if isinstance(image, Image.Image):
        image = F.pil_to_tensor(image.convert("RGB"))
    colors = [color_of(label) for label in detections.labels.tolist()]
    if detections.masks is not None and len(detections.masks):
        masks = _without_overlap(detections.masks)
        image = draw_segmentation_masks(image, masks, alpha=0.5, colors=colors)
    factor = max(1, math.ceil(_MIN_SIDE / max(image.shape[-2:])))
    if factor > 1:
        image = F.resize(image, [factor * side for side in image.shape[-2:]])
    height, width = image.shape[-2:]
    boxes = detections.boxes * factor
    boxes[:, 0::2] = boxes[:, 0::2].clamp(0, width - 1)
    boxes[:, 1::2] = boxes[:, 1::2].clamp(0, height - 1)
    scale = math.sqrt(height * width)
    if len(boxes):
        line = max(2, round(scale / 250))
        # The most certain object is drawn last, over the others.
        image = draw_bounding_boxes(image, boxes.flip(0), colors=colors[::-1], width=line)
    picture = F.to_pil_image(image)
    _write_labels(picture, boxes, detections, colors, max(14, round(scale / 35)))
    return picture


def _without_overlap(masks: Tensor) -> Tensor:
    """Give each pixel to the first of its masks; torchvision draws shared pixels in black."""
    taken = torch.zeros_like(masks[0])
    separate = []
    for mask in masks:
        separate.append(mask & ~taken)
        taken = taken | mask
    return torch.stack(separate)


def _write_labels(
    picture: Image.Image,
    boxes: Tensor,
    detections: Detections,
    colors: list[tuple[int, int, int]],
    size: int,
) -> None:
    """Write class names and scores above the boxes, or inside where the picture ends."""
    path = Path(mpl.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    font = ImageFont.truetype(str(path), size)
    pen = ImageDraw.Draw(picture)
    scores = detections.scores.tolist()
    rows = zip(boxes.tolist(), detections.classes, scores, colors, strict=True)
    for (left, top, _, _), name, score, color in reversed(list(rows)):
        text = f" {name} {score:.2f} "
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
