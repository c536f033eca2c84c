"""Tests of `ResilientDataset`: corrupt images are replaced, too many of them are an error."""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from datasets import CorruptImageError, DataError, FolderImages, ResilientDataset, TarImages

Write = Callable[..., Path]


def to_array(image: object) -> np.ndarray:
    return np.asarray(image)


@pytest.fixture
def files(png: Callable[[int], bytes]) -> dict[str, bytes]:
    """Thirty readable images of one class as {name: content}."""
    return {f"a/{i:02d}.png": png(i) for i in range(30)}


def open_folder(root: Path) -> FolderImages:
    return FolderImages(root, to_array)


@pytest.mark.parametrize("damage", ["truncated", "no_image", "empty", "gone"])
@pytest.mark.parametrize("form", ["folder", "tar"])
def test_one_corrupt_image_is_logged_counted_and_replaced(
    form: str,
    damage: str,
    files: dict[str, bytes],
    write_folder: Write,
    write_tar: Write,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    damaged = {"truncated": files["a/04.png"][:200], "no_image": b"text", "empty": b"", "gone": b""}
    files["a/04.png"] = damaged[damage]
    if form == "tar":
        images = TarImages(write_tar(tmp_path / "train.tar", files), to_array)
    else:
        images = open_folder(write_folder(tmp_path / "train", files))
        if damage == "gone":
            (tmp_path / "train" / "a" / "04.png").unlink()
    with pytest.raises(CorruptImageError, match=r"04\.png"):
        images[4]

    dataset = ResilientDataset(images)
    with caplog.at_level(logging.WARNING):
        drawn = [dataset[i][0] for i in range(len(dataset))]
        dataset[4]
    expected = [images[5 if i == 4 else i][0] for i in range(len(dataset))]
    assert all(np.array_equal(*pair) for pair in zip(drawn, expected, strict=True))
    assert dataset.bad_count == 2
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "04.png" in caplog.text


def test_the_replacement_of_the_last_image_is_the_first(
    files: dict[str, bytes], write_folder: Write, tmp_path: Path
) -> None:
    files["a/29.png"] = b""
    dataset = ResilientDataset(open_folder(write_folder(tmp_path, files)))
    assert np.array_equal(dataset[29][0], dataset[0][0])


def test_too_large_a_share_of_corrupt_images_is_an_error(
    files: dict[str, bytes], write_folder: Write, tmp_path: Path
) -> None:
    for i in range(0, 30, 3):
        files[f"a/{i:02d}.png"] = b""
    root = write_folder(tmp_path, files)
    tolerant = ResilientDataset(open_folder(root), max_bad_fraction=0.4)
    assert len([tolerant[i] for i in range(30)]) == 30
    assert tolerant.bad_count == 10

    strict = ResilientDataset(open_folder(root), max_bad_fraction=0.2)
    with pytest.raises(DataError, match=r"10 of 37 images read are corrupt.*0\.2.*27\.png"):
        [strict[i] for i in range(30)]


def test_a_share_of_zero_allows_no_corrupt_image(
    files: dict[str, bytes], write_folder: Write, tmp_path: Path
) -> None:
    files["a/20.png"] = b""
    dataset = ResilientDataset(open_folder(write_folder(tmp_path, files)), max_bad_fraction=0)
    assert dataset[19]
    with pytest.raises(DataError, match="1 of 2 images read are corrupt"):
        dataset[20]


def test_data_without_a_readable_image_is_an_error(
    files: dict[str, bytes], write_folder: Write, tmp_path: Path
) -> None:
    root = write_folder(tmp_path, dict.fromkeys(list(files)[:3], b""))
    with pytest.raises(DataError, match="none of the 3 images can be read"):
        ResilientDataset(open_folder(root))[1]


def test_other_errors_are_not_hidden(
    files: dict[str, bytes], write_folder: Write, tmp_path: Path
) -> None:
    def broken(image: object) -> None:
        raise OSError("a mistake in the transform")

    dataset = ResilientDataset(FolderImages(write_folder(tmp_path, files), broken))
    with pytest.raises(OSError, match="a mistake in the transform"):
        dataset[0]


def test_the_classes_are_those_of_the_wrapped_data_set(
    files: dict[str, bytes], write_folder: Write, tmp_path: Path
) -> None:
    assert ResilientDataset(open_folder(write_folder(tmp_path, files))).classes == ["a"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_bad_fraction": 1.5}, "max_bad_fraction"),
        ({"max_bad_fraction": float("nan")}, "max_bad_fraction"),
        ({"min_bad": 0}, "min_bad"),
    ],
    ids=["share_above_one", "share_nan", "min_bad"],
)
def test_an_invalid_argument_is_named(options: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ResilientDataset(torch.utils.data.TensorDataset(), **options)
