"""Real images without a download: scikit-learn's 1,797 handwritten digits as a data set on disk.

Optical recognition of handwritten digits (Alpaydin and Kaynak, UCI, 1998), 8 x 8 pixels of 17 gray
levels, split 80/20 with the classes balanced: 1,438 for training, 359 for validation. The split
mixes writers, so figures on it are easier than on unseen writers.

    python -m datasets.embedded ROOT
"""

import argparse
import io
import os
import sys
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from datasets.errors import DataError
from datasets.trees import write_once

_VALIDATION_SIZE = 359
_NOTE_NAME = "digits.txt"
_NOTE = (
    "scikit-learn's 1,797 handwritten digits (UCI, Alpaydin and Kaynak 1998), 8 x 8 pixels;\n"
    "1,438 to train and 359 to validate, classes balanced, writers mixed.\n"
)


def write_digits(root: str | os.PathLike[str]) -> Path:
    """Writes the digits as `train/<digit>/<number>.png`, `val/...`, `train.tar` and `val.tar`.

    The folder appears whole or not at all, and several processes may call this at once. Where the
    digits are already, nothing is written.

    Args:
        root: A new or empty folder, or one that holds the digits.

    Returns:
        The folder.

    Raises:
        DataError: The folder holds something else or cannot be written.
    """
    return write_once(Path(root), "digits", (_NOTE_NAME, _NOTE), _write_splits)


def split_digits() -> dict[str, list[tuple[int, int, np.ndarray]]]:
    """Returns `train` and `val`: (number, digit, ink (8, 8) uint8 in 0..255), by number."""
    # Imported here: scikit-learn takes a second, and only this function needs it.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

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
    for split, digits in split_digits().items():
        files = {f"{digit}/{number:04d}.png": _png(ink) for number, digit, ink in digits}
        for name, content in files.items():
            path = tree / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        _write_tar(tree / f"{split}.tar", files)


def _png(ink: np.ndarray) -> bytes:
    """Encodes ink (8, 8) as an 8-bit gray PNG."""
    buffer = io.BytesIO()
    Image.fromarray(ink).save(buffer, format="PNG")
    return buffer.getvalue()


def _write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name in sorted(files):
            # A fresh TarInfo has no owner and no date, so the archive is the same everywhere.
            member = tarfile.TarInfo(name)
            member.size = len(files[name])
            tar.addfile(member, io.BytesIO(files[name]))


def main(argv: list[str] | None = None) -> None:
    """Writes the digits to the folder named on the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m datasets.embedded", description="Write scikit-learn's digits as images."
    )
    parser.add_argument("root", help="a new or empty folder")
    root = parser.parse_args(argv).root
    try:
        print(write_digits(root))
    except DataError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
