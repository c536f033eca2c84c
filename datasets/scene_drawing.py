"""Drawing of one scene of handwritten digits, with a tight box and a mask for each digit."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

__all__ = ["DIGIT_SIDES", "Box", "Glyph", "Scene", "draw_scene"]

# Smallest and largest side of a resized digit, in pixels.
DIGIT_SIDES = (18, 36)
_MAX_DIGITS = 4
_MAX_TRIES = 50
# A pixel with more ink than this, in 0..1, belongs to the digit's mask.
_INK_THRESHOLD = 0.25

Box = tuple[int, int, int, int]
Glyph = tuple[int, int, np.ndarray]


@dataclass(frozen=True)
class Scene:
    """One image and its n objects.

    Attributes:
        pixels: RGB pixels, (size, size, 3) uint8.
        boxes: Boxes (x, y, width, height) in pixels, n of them.
        digits: Digits 0 to 9, n of them.
        masks: Masks (size, size) bool, n of them.
    """

    pixels: np.ndarray
    boxes: list[Box]
    digits: list[int]
    masks: list[np.ndarray]


def draw_scene(glyphs: list[Glyph], size: int, draw: np.random.Generator) -> Scene:
    """Draw one scene.

    Args:
        glyphs: Digit images to choose from, each (number, digit, ink), with ink (8, 8) uint8 in
            0..255.
        size: Side of the canvas in pixels.
        draw: Random generator for all choices.
    """
    canvas = _background(size, draw)
    taken = np.zeros((size, size), dtype=bool)
    boxes, digits, masks = [], [], []
    for _ in range(draw.integers(1, _MAX_DIGITS + 1)):
        _, digit, glyph = glyphs[draw.integers(len(glyphs))]
        side = int(draw.integers(DIGIT_SIDES[0], DIGIT_SIDES[1] + 1))
        color = draw.uniform(0.4, 1, 3)
        ink = _enlarge(glyph, (side, side))
        left, top, width, height = _tight_box(ink > _INK_THRESHOLD)
        corner = _find_corner(taken, width, height, draw)
        if corner is None:
            continue
        x, y = corner
        mask = np.zeros((size, size), dtype=bool)
        _paste(canvas, mask, ink, color / color.max(), x - left, y - top)
        taken[y : y + height, x : x + width] = True
        boxes.append((x, y, width, height))
        digits.append(digit)
        masks.append(mask)
    return Scene((canvas.clip(0, 1) * 255).round().astype(np.uint8), boxes, digits, masks)


def _background(size: int, draw: np.random.Generator) -> np.ndarray:
    """Draw smooth dark colors with noise, (size, size, 3) in about 0..0.5."""
    coarse = draw.uniform(0, 0.35, (4, 4, 3))
    soft = _enlarge((coarse * 255).round().astype(np.uint8), (size, size))
    return soft + draw.normal(0, 0.06, soft.shape)


def _enlarge(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize uint8 pixels (bicubic) to (width, height); return floats in 0..1."""
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)) / 255


def _tight_box(mask: np.ndarray) -> Box:
    """Return the smallest box around the True pixels of a mask."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    x, y = int(columns[0]), int(rows[0])
    return x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y


def _find_corner(
    taken: np.ndarray, width: int, height: int, draw: np.random.Generator
) -> tuple[int, int] | None:
    """Try random corners (x, y) until a box fits inside, a pixel away from all others."""
    size = len(taken)
    for _ in range(_MAX_TRIES):
        x, y = int(draw.integers(size - width + 1)), int(draw.integers(size - height + 1))
        if not taken[max(0, y - 1) : y + height + 1, max(0, x - 1) : x + width + 1].any():
            return x, y
    return None


def _paste(
    canvas: np.ndarray, mask: np.ndarray, ink: np.ndarray, color: np.ndarray, x: int, y: int
) -> None:
    """Draw `ink` with its corner at (x, y); the faint margin outside the canvas is dropped."""
    left, top = max(0, -x), max(0, -y)
    part = ink[top : len(canvas) - y, left : len(canvas) - x]
    rows = slice(y + top, y + top + part.shape[0])
    columns = slice(x + left, x + left + part.shape[1])
    canvas[rows, columns] += part[..., None] * (color - canvas[rows, columns])
    mask[rows, columns] = part > _INK_THRESHOLD
