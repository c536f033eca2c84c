"""Handwritten digits: a small classification data set without a download.

The 1,797 images are part of scikit-learn: "Optical recognition of handwritten digits" (Alpaydin and
Kaynak, UCI, 1998), 8 x 8 pixels with 17 gray levels. They are split 80/20 with balanced classes,
1,438 for training and 359 for validation. Both splits have digits of the same writers, so metrics
are better than they would be for unseen writers.

    python -m datasets.embedded ROOT
"""

import argparse
import io
import os
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from datasets.errors import DataError
from datasets.write_once import write_once

__all__ = ["write_digits", "split_digits", "write_split", "main"]

_VALIDATION_SIZE = 359
_NOTE_NAME = "digits.txt"
_NOTE = (
    "scikit-learn's 1,797 handwritten digits (UCI, Alpaydin and Kaynak 1998), 8 x 8 pixels;\n"
    "1,438 to train and 359 to validate, classes balanced, writers mixed.\n"
)


def write_digits(root: str | os.PathLike[str]) -> Path:
    """Write the digits as `train/<digit>/<number>.png`, `val/...`, `train.tar` and `val.tar`.

    The folder appears complete or not at all, and several processes may call this at the same time.
    If the folder already has the digits, nothing is written.

    Args:
        root: A new or empty folder, or one with the digits.

    Returns:
        The absolute path of the folder.

    Raises:
        DataError: The folder has other content or cannot be written.
    """
    return write_once(Path(root), "digits", (_NOTE_NAME, _NOTE), _write_splits)


def split_digits() -> dict[str, list[tuple[int, int, np.ndarray]]]:
    """Return the digits of the splits `train` and `val`, sorted by number.

    Returns:
        Triples (number, digit, ink) of each split: the number in scikit-learn's data, the digit
        0 to 9 and its image (8, 8) uint8, in which 255 is full ink.

    Raises:
        DataError: scikit-learn is not installed.
    """
    # Imported here because the import takes a second and only this function needs it.
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise DataError(
            f"the built-in digits need scikit-learn ({error}): pip install scikit-learn"
        ) from error

    images, labels = load_digits(return_X_y=True)
    inks = np.round(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    train, val = train_test_split(
        np.arange(len(labels)), test_size=_VALIDATION_SIZE, stratify=labels, random_state=0
    )
    return {
        split: [(number, int(labels[number]), inks[number]) for number in sorted(chosen.tolist())]
        for split, chosen in (("train", train), ("val", val))
    }


def _write_splits(tree: Path) -> None:
    """Write folders and tars of both splits to the folder `tree`."""
    for split, digits in split_digits().items():
        write_split(tree, split, {f"{digit}/{number:04d}": ink for number, digit, ink in digits})


def write_split(tree: Path, split: str, images: Mapping[str, np.ndarray]) -> None:
    """Write the images of a split as PNG files, in class folders and in a tar.

    Args:
        tree: Folder of the splits.
        split: `train` or `val`.
        images: Images uint8, (H, W) gray or (H, W, 3) RGB, by name: `class/name` without an
            extension.
    """
    files = {f"{name}.png": _png(image) for name, image in images.items()}
    for name, content in files.items():
        path = tree / split / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    _write_tar(tree / f"{split}.tar", files)


def _png(image: np.ndarray) -> bytes:
    """Encode an image uint8, (H, W) gray or (H, W, 3) RGB, as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def _write_tar(path: Path, files: dict[str, bytes]) -> None:
    """Write {name: content} as a tar, sorted by name."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name in sorted(files):
            # A new TarInfo has no owner and no date, so the tar is identical on every machine.
            member = tarfile.TarInfo(name)
            member.size = len(files[name])
            tar.addfile(member, io.BytesIO(files[name]))


def main(argv: list[str] | None = None) -> None:
    """Write the digits to the folder given on the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m datasets.embedded", description="Write scikit-learn's digits as images."
    )
    parser.add_argument("root", help="new or empty folder to write to")
    root = parser.parse_args(argv).root
    try:
        print(write_digits(root))
    except DataError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
