"""Pictures of evaluations: pixels of normalized images, their size, captions and bar charts.

matplotlib is imported only where a chart or text is drawn. Charts use no global state of pyplot.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from engine.optional import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "MAX_BARS",
    "captioned",
    "draw_bars",
    "fit_scale",
    "label_font",
    "resized",
    "to_pixels",
]

MAX_BARS = 40
"""Maximum number of classes in a bar chart."""

_MIN_SIDE, _MAX_SIDE = 224, 640
_FONT_SIZE, _LINE = 13, 17


def to_pixels(
    image: Tensor,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> Tensor:
    """Return the pixels of an image, which may be normalized.

    Args:
        image: Image `(3, H, W)`, uint8 or normalized.
        mean: Mean of each color that it was normalized with.
        std: Standard deviation of each color.

    Returns:
        The image as uint8 `(3, H, W)` on the CPU.
    """
    if image.dtype == torch.uint8:
        return image.cpu()
    scale, shift = (torch.tensor(values)[:, None, None] for values in (std, mean))
    return ((image.float().cpu() * scale + shift).clamp(0, 1) * 255).round().to(torch.uint8)


def fit_scale(height: int, width: int) -> float:
    """Return the factor that brings the long side of a picture between 224 and 640 pixels."""
    long_side = max(height, width)
    return min(max(long_side, _MIN_SIDE), _MAX_SIDE) / long_side


def resized(pixels: Tensor) -> Tensor:
    """Resize a picture uint8 `(3, H, W)` by `fit_scale`; small ones keep sharp pixels."""
    height, width = pixels.shape[1:]
    scale = fit_scale(height, width)
    if scale == 1:
        return pixels
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    if scale > 1:
        return F.interpolate(pixels[None], size, mode="nearest-exact")[0]
    smaller = F.interpolate(pixels[None].float(), size, mode="bilinear", antialias=True)
    return smaller[0].round().clamp(0, 255).to(torch.uint8)


def captioned(pixels: Tensor, lines: Sequence[str]) -> np.ndarray:
    """Add lines of text below a picture.

    Args:
        pixels: Picture uint8 `(3, H, W)`.
        lines: Text below it, cut at its width.

    Returns:
        The new picture uint8 `(H + text, W, 3)`.
    """
    array = pixels.permute(1, 2, 0).numpy()
    height, width = array.shape[:2]
    canvas = Image.new("RGB", (width, height + _LINE * len(lines) + 4), "white")
    canvas.paste(Image.fromarray(array), (0, 0))
    draw = ImageDraw.Draw(canvas)
    font = label_font(_FONT_SIZE)
    for number, line in enumerate(lines):
        draw.text((3, height + 2 + number * _LINE), line, fill="black", font=font)
    return np.asarray(canvas)


def label_font(size: int) -> ImageFont.FreeTypeFont:
    """Return a font for names of classes; the font of Pillow has only ASCII.

    Raises:
        UserError: matplotlib, which has the font, is not installed.
    """
    require("matplotlib", "text in pictures")
    import matplotlib

    path = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return ImageFont.truetype(str(path), size)


def draw_bars(axes: "Axes", names: Sequence[str], series: Mapping[str, Sequence[float]]) -> None:
    """Draw horizontal bars, the first class on top.

    Args:
        axes: Axes of matplotlib.
        names: Names of the classes.
        series: Values of the classes, by the name of the metric.
    """
    height = 0.8 / len(series)
    for number, (label, values) in enumerate(series.items()):
        places = [place + (number - (len(series) - 1) / 2) * height for place in range(len(names))]
        axes.barh(places, values, height, label=label)
    axes.set_yticks(range(len(names)), [name[:24] for name in names], parse_math=False)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="x", alpha=0.3)
    if len(series) > 1:
        axes.legend(loc="lower right")
