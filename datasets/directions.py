"""Two digits in an image, labeled with the direction from the red one to the green one.

An image has 4 x 4 cells of 8 x 8 pixels. One cell has a red digit of scikit-learn, another one a
green digit; all others are black. The label is where the green digit is, seen from the red one: one
of the four sides if they share a row or a column, else one of the four diagonals.

With patches of 8 x 8 pixels, each digit is exactly one token, so no token shows a direction. A
model without positions can only guess among the 8 classes (12.5 %). A model that has only distances
between tokens separates the sides from the diagonals at best, and guesses among 4 (25 %): a
reflection or transposition of the cells changes the label but no distance.

Training images use the training digits of `datasets.embedded`, validation images the others.
"""

import os
from functools import partial
from pathlib import Path

import numpy as np

from datasets.embedded import split_digits, write_split
from datasets.write_once import write_once

__all__ = ["CELL", "DIRECTIONS", "GRID", "write_directions"]

CELL = 8  # pixels per side, as scikit-learn's digits have
GRID = 4  # cells per side

DIRECTIONS = {
    (-1, -1): "above_left",
    (-1, 0): "above",
    (-1, 1): "above_right",
    (0, -1): "left",
    (0, 1): "right",
    (1, -1): "below_left",
    (1, 0): "below",
    (1, 1): "below_right",
}
"""Signs of the row and column of the green digit minus those of the red one → class."""

_NOTE_NAME = "directions.txt"


def write_directions(
    root: str | os.PathLike[str], *, train: int = 4000, val: int = 800, seed: int = 0
) -> Path:
    """Write the images as `train/<direction>/<number>.png`, `val/...`, `train.tar` and `val.tar`.

    Each class has the same number of images, up to one. The folder appears complete or not at all,
    and several processes may call this at the same time. If the folder already has these images,
    nothing is written.

    Args:
        root: A new or empty folder, or one with these images.
        train: Number of training images.
        val: Number of validation images.
        seed: Seed of all random choices.

    Returns:
        The absolute path of the folder.

    Raises:
        DataError: The folder has other content or cannot be written, or scikit-learn is not
            installed.
    """
    counts = {"train": train, "val": val}
    note = (
        "Directions between two of scikit-learn's digits, 32 x 32 pixels;\n"
        f"{train} images to train and {val} to validate, seed {seed}.\n"
    )
    fill = partial(_write_splits, counts=counts, seed=seed)
    return write_once(Path(root), "directions", (_NOTE_NAME, note), fill)


def _write_splits(tree: Path, counts: dict[str, int], seed: int) -> None:
    """Write folders and tars of both splits to the folder `tree`."""
    pairs = _cell_pairs()
    names = sorted(pairs)
    for number, (split, digits) in enumerate(split_digits().items()):
        draw = np.random.default_rng((seed, number))
        images = {}
        for i in range(counts[split]):
            name = names[i % len(names)]
            images[f"{name}/{i:05d}"] = _draw_image(digits, pairs[name], draw)
        write_split(tree, split, images)


def _cell_pairs() -> dict[str, np.ndarray]:
    """Return all pairs of cells by class, each (K, 2, 2): red and green digit, row, column."""
    cells = np.stack(np.divmod(np.arange(GRID * GRID), GRID), axis=-1)
    red, green = (cells[i] for i in np.divmod(np.arange(len(cells) ** 2), len(cells)))
    signs = np.sign(green - red)
    pairs = np.stack((red, green), axis=1)
    return {name: pairs[(signs == sign).all(-1)] for sign, name in DIRECTIONS.items()}


def _draw_image(
    digits: list[tuple[int, int, np.ndarray]], pairs: np.ndarray, draw: np.random.Generator
) -> np.ndarray:
    """Draw an image (32, 32, 3) uint8 with two digits in one of the cell pairs."""
    image = np.zeros((GRID * CELL, GRID * CELL, 3), dtype=np.uint8)
    cells = pairs[draw.integers(len(pairs))]
    for channel, (row, column) in enumerate(cells.tolist()):
        _, _, ink = digits[draw.integers(len(digits))]
        image[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL, channel] = ink
    return image
