"""Draw the attention of one query over the image, with and without iRPE."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from scripts.inspect.layers import LayerAttention

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
    from matplotlib.image import AxesImage

__all__ = ["attention_figure"]

_COLUMNS = 6
_PANEL = 1.9  # inches


def attention_figure(
    layers: Sequence[LayerAttention],
    pixels: Tensor,
    query: tuple[int, int] | None,
    *,
    letters: str,
    skip: int,
    note: str = "",
) -> "Figure":
    """Draw the attention of one query in every layer, averaged over the heads.

    Args:
        layers: Attention of each layer.
        pixels: The image `(height, width, 3)` in [0, 1].
        query: Row and column of the query, from 0; None for the class token.
        letters: Letters that have an encoding.
        skip: Number of tokens before the grid.
        note: Text below the panels.
    """
    from matplotlib.figure import Figure

    blocks = [layers[i : i + _COLUMNS] for i in range(0, len(layers), _COLUMNS)]
    has_added = layers[0].added is not None
    # The image, then up to six layers; a panel is as high as the image.
    columns = 1 + len(blocks[0])
    ratio = min(max(pixels.shape[0] / pixels.shape[1], 0.5), 1.6)
    rows = 3 if has_added else 1
    height = (_PANEL * ratio + 0.25) * rows + (0.9 if has_added else 0.5)
    figure = Figure((_PANEL * columns + 1.2, height * len(blocks) + 1.2), layout="constrained")
    parts = figure.subfigures(len(blocks), 1, squeeze=False)[:, 0]
    index = 0 if query is None else skip + query[0] * layers[0].grid[1] + query[1]
    for number, (part, block) in enumerate(zip(parts, blocks, strict=True)):
        axes = part.subplots(rows, columns, squeeze=False)
        _draw_image(axes[0, 0], pixels, query, layers[0].grid)
        for empty in (*axes[1:, 0], *axes[:, 1 + len(block) :].flat):
            empty.set_visible(False)
        for place, layer in enumerate(block, 1):
            title = f"layer {number * _COLUMNS + place}"
            _draw_layer(part, axes[:, place], layer, index, (pixels, query, skip), title)
        for panel, label in zip(
            axes[:, 1], ("with iRPE", "without", "added to logits"), strict=False
        ):
            panel.set_ylabel(label if has_added else "attention", fontsize=10)
    figure.suptitle(_title(query, layers[0].grid, letters, has_added), fontsize=11)
    remark = note or _cancels(layers, query, index, letters)
    if remark:
        figure.supxlabel(remark, fontsize=10)
    return figure


def _draw_layer(
    figure: "Figure | SubFigure",
    axes: Sequence["Axes"],
    layer: LayerAttention,
    index: int,
    scene: tuple[Tensor, tuple[int, int] | None, int],
    title: str,
) -> None:
    """Draw the panels of one layer in a column, with a color bar for each unit."""
    pixels, query, skip = scene
    rows = [layer.with_rpe[index], layer.without[index]][: len(axes)]
    limit = max(row[skip:].max().item() for row in rows)
    for panel, row in zip(axes, rows, strict=False):
        values = row[skip:].view(layer.grid)
        shown = _overlay(panel, pixels, values, query, cmap="inferno", vmin=0, vmax=limit)
        if skip:
            panel.set_title(f"{_skipped(skip)} {row[:skip].sum():.0%}", fontsize=8)
    axes[0].set_title("\n".join([title, axes[0].get_title()]).strip(), fontsize=9)
    _color_bar(figure, shown, axes[:2] if len(axes) > 1 else axes)
    if layer.added is None:
        return
    added = layer.added[index]
    limit = added.abs().max().item() or 1.0
    values = added[skip:].view(layer.grid)
    shown = _overlay(axes[2], pixels, values, query, cmap="PuOr_r", vmin=-limit, vmax=limit)
    if skip:
        text = f"{added[:skip].mean():+.2g}".replace("-", "−")
        axes[2].set_title(f"{_skipped(skip)} {text}", fontsize=8)
    _color_bar(figure, shown, axes[2:])


def _skipped(skip: int) -> str:
    """Return the name of the tokens before the grid."""
    return "class token" if skip == 1 else f"{skip} tokens before the grid"


def _color_bar(figure: "Figure | SubFigure", shown: "AxesImage", axes: Sequence["Axes"]) -> None:
    """Draw a horizontal color bar with few ticks below some panels."""
    from matplotlib.ticker import MaxNLocator

    bar = figure.colorbar(
        shown, ax=list(axes), location="bottom", aspect=14, pad=0.03, ticks=MaxNLocator(2)
    )
    bar.ax.tick_params(labelsize=7)


def _draw_image(
    axes: "Axes", pixels: Tensor, query: tuple[int, int] | None, grid: tuple[int, int]
) -> None:
    """Draw the image as the model sees it, and the query."""
    axes.imshow(pixels.numpy())
    _mark(axes, pixels, query, grid)
    axes.set_title("image", fontsize=9)


def _overlay(
    axes: "Axes",
    pixels: Tensor,
    values: Tensor,
    query: tuple[int, int] | None,
    **colors: object,
) -> "AxesImage":
    """Draw a value for each token over the image in gray."""
    height, width = pixels.shape[:2]
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    # A light background, so that colors look as in the color bar.
    background = 0.6 + 0.4 * pixels.mean(-1)
    axes.imshow(background.numpy(), cmap="gray", vmin=0, vmax=1, extent=extent)
    shown = axes.imshow(values.numpy(), extent=extent, alpha=0.7, interpolation="nearest", **colors)
    _mark(axes, pixels, query, tuple(values.shape))
    return shown


def _mark(
    axes: "Axes", pixels: Tensor, query: tuple[int, int] | None, grid: tuple[int, int]
) -> None:
    """Mark the query, and remove the ticks."""
    if query is not None:
        y, x = (
            (place + 0.5) * side / length - 0.5
            for place, side, length in zip(query, pixels.shape[:2], grid, strict=True)
        )
        axes.plot(x, y, marker="*", markersize=9, color="cyan", markeredgecolor="black")
    axes.set_xticks([])
    axes.set_yticks([])


def _title(
    query: tuple[int, int] | None, grid: tuple[int, int], letters: str, has_added: bool
) -> str:
    """Return the title of the picture."""
    name = (
        "the class token"
        if query is None
        else f"the query ★ in row {query[0]}, column {query[1]} of {grid[0]} × {grid[1]} tokens"
    )
    effect = (
        f"with and without the iRPE on {' and '.join(letters.replace('v', ''))} of that layer"
        if has_added
        else "iRPE on v does not change attention weights"
    )
    return f"Attention of {name}, mean of the heads\n{effect}"


def _cancels(
    layers: Sequence[LayerAttention], query: tuple[int, int] | None, index: int, letters: str
) -> str:
    """Explain why iRPE has no effect on the attention of the class token, if it has none."""
    same = all(torch.allclose(x.with_rpe[index], x.without[index], atol=1e-5) for x in layers)
    if query is not None or layers[0].added is None or not same:
        return ""
    return (
        "All pairs of the class token are in one bucket: the same number is added to the logits of "
        "all its keys,\nand softmax cancels it. iRPE acts on the rows of the other tokens."
    )
