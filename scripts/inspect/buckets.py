"""Draw the buckets of all keys around one query."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from irpe_core import RPEConfig
from scripts.inspect.layers import relative_buckets

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

__all__ = ["bucket_figure", "draw_buckets"]

TITLES = {
    "euc": "Euclidean: bucket of the rounded distance",
    "quant": "quantization: bucket of the squared distance",
    "cross": "cross: a row bucket plus a column bucket",
    "product": "product: a bucket for each pair of row and column",
}
_FONT = 8.5  # points
_SMALLEST_FONT = 4.5


def bucket_figure(config: RPEConfig, grid: tuple[int, int], query: tuple[int, int]) -> "Figure":
    """Draw the buckets of one encoding, with a color bar.

    Args:
        config: The encoding.
        grid: Height and width in tokens.
        query: Row and column of the query, from 0.
    """
    from matplotlib.figure import Figure

    height, width = grid
    cell = min(0.4, max(0.23, 7 / max(grid)))  # inches
    figure = Figure(
        (max(cell * width, 4.2) + 1.8, max(cell * height, 3) + 1.8), layout="constrained"
    )
    axes = figure.subplots()
    shown = draw_buckets(axes, config, grid, query, cell=72 * cell)
    axes.set_xlabel("column of the key")
    axes.set_ylabel("row of the key")
    for axis, length in ((axes.xaxis, width), (axes.yaxis, height)):
        axis.set_ticks(range(0, length, 1 if length <= 16 else 5))
    figure.suptitle(
        f"Bucket of every key for the query ★ in row {query[0]}, column {query[1]} "
        f"of {height} × {width} tokens",
        fontsize=11,
    )
    along = "" if config.method in ("euc", "quant") else ", larger of rows and columns"
    farthest = int(shown.get_array().max())
    bar = figure.colorbar(
        shown,
        ax=axes,
        label=f"buckets from the query{along}",
        ticks=range(0, farthest + 1, 1 + farthest // 10),
    )
    bar.ax.set_ylim(0, max(farthest, 1))
    return figure


def draw_buckets(
    axes: "Axes",
    config: RPEConfig,
    grid: tuple[int, int],
    query: tuple[int, int],
    *,
    cell: float = 25.0,
) -> "AxesImage":
    """Draw the bucket ids of one method, with a line wherever the bucket changes.

    Args:
        axes: Axes to draw into.
        config: The encoding.
        grid: Height and width in tokens.
        query: Row and column of the query, from 0.
        cell: Size of a token in points; ids that would be too small are left out.

    Returns:
        The colors, which are the distance of each bucket from that of the query.
    """
    (height, width), (row, column) = grid, query
    half = config.side // 2
    ids = relative_buckets(config, *grid)
    ids = ids[:, height - 1 - row :, width - 1 - column :][:, :height, :width]
    terms = [x - number * config.num_buckets for number, x in enumerate(ids)]
    if config.method == "product":
        parts = [terms[0] // config.side - half, terms[0] % config.side - half]
    else:
        parts = [x - half for x in terms]
    # One id for each pair of cross.
    joint = terms[0] if len(terms) == 1 else terms[0] * config.num_buckets + terms[1]
    level = torch.stack(parts).abs().amax(0)
    shown = axes.imshow(level.numpy(), cmap="YlGnBu", vmin=0, vmax=2.2 * max(level.max().item(), 1))
    _draw_borders(axes, joint)
    axes.plot(column, row, marker="*", markersize=min(15, 0.6 * cell), color="black")
    font = min(_FONT - 0.5 * (len(terms) - 1), 0.4 * cell)
    for i, j in _labeled_cells(joint, query) if font >= _SMALLEST_FONT else ():
        text = "\n".join(str(int(x[int(i), int(j)])) for x in terms)
        axes.text(j, i, text, ha="center", va="center", fontsize=font, linespacing=1)
    number = len(joint.unique())
    kinds = "pairs of buckets" if config.method == "cross" else "buckets"
    axes.set_title(
        f"{TITLES[config.method]}\nratio {config.ratio:g}, {number} {kinds} on this grid",
        fontsize=11,
    )
    axes.set_xticks([])
    axes.set_yticks([])
    return shown


def _labeled_cells(ids: Tensor, query: tuple[int, int]) -> list[list[float]]:
    """Choose the cells to write an id into: the middle of a rectangle, every cell of a ring."""
    cells = []
    for bucket in ids.unique():
        members = (ids == bucket).nonzero()
        sides = members.amax(0) - members.amin(0) + 1
        is_rectangle = sides.prod() == len(members)
        cells += (members.float().mean(0, keepdim=True) if is_rectangle else members).tolist()
    return [cell for cell in cells if tuple(cell) != query]


def _draw_borders(axes: "Axes", ids: Tensor) -> None:
    """Draw a line between neighboring cells of different buckets."""
    from matplotlib.collections import LineCollection

    lines = [
        [(j + 0.5, i - 0.5), (j + 0.5, i + 0.5)]
        for i, j in (ids[:, 1:] != ids[:, :-1]).nonzero().tolist()
    ]
    lines += [
        [(j - 0.5, i + 0.5), (j + 0.5, i + 0.5)]
        for i, j in (ids[1:] != ids[:-1]).nonzero().tolist()
    ]
    axes.add_collection(LineCollection(lines, colors="black", linewidths=1.2))
