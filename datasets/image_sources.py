"""Images that an annotation file names, read from a folder or from a zip alike.

An annotation file says `000000000009.jpg`; the zip's member may be `train2017/000000000009.jpg`.
So names are looked up as they are, in a folder called as the source itself, and in the only folder
at the top of a zip. All are looked up at once: a missing image shows at the start, not after an
hour of training.
"""

import os
import posixpath
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from datasets.archives import ZipArchive
from datasets.errors import DataError
from datasets.images import read_bytes
from datasets.names import PackedNames


class ImageSource(Protocol):
    """Images by number, in the order of the file names that they were asked for."""

    path: Path

    def read(self, index: int) -> bytes: ...


class FolderSource:
    """Images in a folder.

    Args:
        path: The folder.
        file_names: N names of images.

    Raises:
        DataError: An image is missing.
    """

    def __init__(self, path: Path, file_names: Sequence[str]) -> None:
        self.path = path
        prefixes = ("", f"{path.name}/")
        parents = {posixpath.dirname(name) for name in file_names}
        present = set(_list(path, (prefix + parent for prefix in prefixes for parent in parents)))
        self._names = PackedNames.pack(_find(path, file_names, prefixes, present))

    def read(self, index: int) -> bytes:
        """Returns the content of image file `index`.

        Raises:
            CorruptImageError: The file cannot be read.
        """
        return read_bytes(self.path / self._names[index])


class ZipSource:
    """Images in a zip, read in place.

    Args:
        path: The archive.
        file_names: N names of images.

    Raises:
        DataError: The archive is damaged, or an image is missing.
    """

    def __init__(self, path: Path, file_names: Sequence[str]) -> None:
        self.path = path
        self.archive = ZipArchive(path)
        positions = {name: position for position, name in enumerate(self.archive.names)}
        tops = {name.partition("/")[0] for name in positions if "/" in name} - {"__MACOSX"}
        prefixes = ["", f"{path.stem}/", *(f"{top}/" for top in tops if len(tops) == 1)]
        names = _find(path, file_names, prefixes, positions)
        self._positions = np.array([positions[name] for name in names], dtype=np.int64)

    def read(self, index: int) -> bytes:
        """Returns the content of image `index`.

        Raises:
            CorruptImageError: The member cannot be read.
        """
        return self.archive.read_at(int(self._positions[index]))


def open_images(path: str | os.PathLike[str], file_names: Sequence[str]) -> ImageSource:
    """Opens a folder or a zip, whichever is at `path`.

    Args:
        path: Folder or zip.
        file_names: The names of the images, as the annotation file has them.

    Raises:
        DataError: Neither is there, the zip is damaged, or an image is missing.
    """
    path = Path(path)
    if path.is_dir():
        return FolderSource(path, file_names)
    if path.is_file():
        return ZipSource(path, file_names)
    raise DataError(f"there are no images at {path}: expected a folder or a zip")


def find_split(root: Path, name: str) -> tuple[Path, str]:
    """Finds the images of a split: the folder `root/name`, or else `root/name.zip`.

    Returns:
        The path, and a sentence where both are there.

    Raises:
        DataError: Neither is there.
    """
    folder, archive = root / name, root / f"{name}.zip"
    # An empty folder, left over or made for a mount, is no data.
    if folder.is_dir() and any(folder.iterdir()):
        note = f"both {folder} and {archive} are there: the folder is used"
        return folder, note if archive.is_file() else ""
    if archive.is_file():
        return archive, ""
    raise DataError(f"there are no images in {root}: expected the folder {name} or {name}.zip")


def _find(
    path: Path, file_names: Sequence[str], prefixes: Sequence[str], present: Collection[str]
) -> list[str]:
    """Returns the names with the first prefix under which all of them are present."""
    fewest: list[str] | None = None
    for prefix in prefixes:
        names = [posixpath.normpath(prefix + name) for name in file_names]
        missing = [name for name in names if name not in present]
        if not missing:
            return names
        if fewest is None or len(missing) < len(fewest):
            fewest = missing
    assert fewest is not None
    raise DataError(
        f"{path} lacks the image {fewest[0]}, which the annotations name: {len(fewest)} of "
        f"{len(file_names)} images are missing"
    )


def _list(path: Path, folders: Iterable[str]) -> Iterator[str]:
    """Yields the files in some folders below `path`; one that is not there has none."""
    for folder in folders:
        try:
            entries = os.listdir(path / folder)  # noqa: PTH208  (names alone, and faster)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise DataError(f"cannot list {path / folder}: {error.strerror}") from error
        yield from (posixpath.normpath(posixpath.join(folder, entry)) for entry in entries)
