"""Draw the learned tables of all layers, at the positions that their buckets have."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from scripts.inspect.layers import (
    encodings_of,
    relative_buckets,
    table_by_position,
    used_buckets,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["table_figure"]

_COLUMNS = 6
_PANEL = 2.4  # inches


def table_figure(
    layers: Sequence[nn.Module], letter: str, grid: tuple[int, int], *, reads_class_token: bool
) -> "Figure":
    """Draw the tables of one letter: a panel for each layer, or for each layer and head.

    Args:
        layers: Attentions with iRPE.
        letter: `q`, `k` or `v`.
        grid: Height and width in tokens.
        reads_class_token: The head of the model reads nothing but the class token.
    """
    from matplotlib.figure import Figure

    encodings = [encodings_of(layer)[letter] for layer in layers]
    config = encodings[0].config
    ids = relative_buckets(config, *grid)
    maps = torch.stack([table_by_position(letter, e, ids) for e in encodings])
    count, heads = maps.shape[:2]
    # A row for each layer, or several layers in a row if there is one head.
    columns = heads if heads > 1 else min(count, _COLUMNS)
    rows = -(-count * heads // columns)
    height = _PANEL * min(max(grid[0] / grid[1], 0.5), 1.5) + 0.3
    figure = Figure((_PANEL * columns + 1.6, height * rows + 1.4), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    signed = config.mode == "bias"
    limit = maps.abs().max().item() or 1.0
    colors = {"cmap": "PuOr_r" if signed else "viridis", "vmin": -limit if signed else 0}
    for panel in panels.flat[count * heads :]:
        panel.set_visible(False)
    for number, encoding in enumerate(encodings):
        for head in range(heads):
            panel = panels.flat[number * heads + head]
            shown = _draw_map(panel, maps[number, head].numpy(), grid, vmax=limit, **colors)
            lines = [f"layer {number + 1}" + (f", head {head + 1}" if heads > 1 else "")]
            lines += _remarks(letter, encoding, head)
            panel.set_title("\n".join(lines), fontsize=9)
    meaning = "bias" if signed else "length of the vector"
    figure.colorbar(shown, ax=panels, label=f"{meaning} of the bucket", aspect=15 * rows)
    figure.suptitle(_title(letter, encodings[0]), fontsize=11)
    figure.supxlabel(
        "columns from the query ★ to the key" + _note(letter, encodings, reads_class_token),
        fontsize=10,
    )
    figure.supylabel("rows from the query to the key", fontsize=10)
    return figure


def _draw_map(panel: "Axes", values: object, grid: tuple[int, int], **colors: object) -> object:
    """Draw the values of all relative positions with the query in the center."""
    (rows, columns) = (length - 0.5 for length in grid)
    extent = (-columns, columns, rows, -rows)
    shown = panel.imshow(values, extent=extent, interpolation="nearest", **colors)
    panel.plot(0, 0, marker="*", markersize=7, color="red", markeredgecolor="white")
    panel.tick_params(labelsize=8)
    return shown


def _remarks(letter: str, encoding: nn.Module, head: int) -> list[str]:
    """Return the lines of a title: used buckets, and the extra bucket of skipped tokens."""
    config = encoding.config
    total = config.num_buckets * (2 if config.method == "cross" else 1)
    used = used_buckets(letter, encoding)
    lines = [] if used == total else [f"{used} of {total} buckets nonzero"]
    if config.skip:
        last = torch.arange(1, total // config.num_buckets + 1) * config.num_buckets - 1
        value = table_by_position(letter, encoding, last[:, None, None])[head].item()
        name = "the class token" if config.skip == 1 else "tokens before the grid"
        lines.append(f"with {name}: {value:.2g}".replace("-", "−"))
    return lines


def _title(letter: str, encoding: nn.Module) -> str:
    """Return the title of the picture."""
    config = encoding.config
    kind = "contextual" if config.mode == "ctx" else "bias"
    shared = "shared by the heads" if config.shared_head else "one for each head"
    return (
        f"Learned tables of the iRPE on {letter}: {config.method}, {kind}, ratio {config.ratio:g}, "
        f"{shared}"
    )


def _note(letter: str, encodings: Sequence[nn.Module], reads_class_token: bool) -> str:
    """Explain why the last table of a classifier is empty, if it is."""
    if not reads_class_token or used_buckets(letter, encodings[-1]) > 1:
        return ""
    number, buckets = len(encodings), encodings[-1].config.num_buckets
    return (
        f"\n\nLayer {number}: only the class token's row reaches the loss. All its pairs are in "
        f"one bucket,\nso the other {buckets - 1} buckets get no gradient and stay zero."
    )
