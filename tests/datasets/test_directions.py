"""Tests of the directions between digits: labels, cells, balance and splits."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets import build_dataset, build_imagenet
from datasets.directions import CELL, GRID, write_directions
from datasets.embedded import split_digits
from datasets.errors import DataError


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_directions(tmp_path_factory.mktemp("data") / "directions", train=400, val=83)


def filled_cells(image: np.ndarray) -> dict[tuple[int, int], bytes]:
    """Return the cells of an image (H, W) that are not black, by row and column."""
    assert image.shape == (GRID * CELL, GRID * CELL)
    cells = image.reshape(GRID, CELL, GRID, CELL).swapaxes(1, 2)
    return {
        (row, column): cells[row, column].tobytes()
        for row in range(GRID)
        for column in range(GRID)
        if cells[row, column].any()
    }


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_label_is_where_the_green_digit_is(root: Path, split: str) -> None:
    inks = {ink.tobytes() for _, _, ink in split_digits()[split]}
    for path in sorted((root / split).rglob("*.png")):
        channels = [
            filled_cells(channel) for channel in np.moveaxis(np.array(Image.open(path)), 2, 0)
        ]
        # Each digit is in one cell, and is one of the digits of this split.
        ((red, red_ink),), ((green, green_ink),) = (each.items() for each in channels[:2])
        assert channels[2] == {}
        assert red != green
        assert {red_ink, green_ink} <= inks
        words = []
        if green[0] != red[0]:
            words.append("above" if green[0] < red[0] else "below")
        if green[1] != red[1]:
            words.append("left" if green[1] < red[1] else "right")
        assert path.parent.name == "_".join(words)


def test_classes_are_balanced_and_folders_equal_tars(root: Path) -> None:
    for split, count in (("train", 400), ("val", 83)):
        folder = build_imagenet(root, split)
        assert len(folder) == count
        assert folder.samples == build_imagenet(root, split, load_tar=True).samples
        shares = Counter(folder.targets.tolist()).values()
        assert len(shares) == 8
        assert max(shares) - min(shares) <= 1


def test_the_seed_decides_the_images(root: Path, tmp_path: Path) -> None:
    same = write_directions(tmp_path / "same", train=400, val=83)
    other = write_directions(tmp_path / "other", train=400, val=83, seed=1)
    tar = (root / "train.tar").read_bytes()
    assert (same / "train.tar").read_bytes() == tar
    assert (other / "train.tar").read_bytes() != tar
    with pytest.raises(DataError, match="holds other files"):
        write_directions(other, train=400, val=83)


def test_the_trainer_writes_them_at_the_first_use(tmp_path: Path) -> None:
    data = build_dataset("DIRECTIONS", tmp_path / "new", "val", load_tar=True)
    assert len(data) == 800
    vertical, horizontal = {"above", "below"}, {"left", "right"}
    assert {*data.classes} == vertical | horizontal | {
        f"{a}_{b}" for a in vertical for b in horizontal
    }
