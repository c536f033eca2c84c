"""The images of an annotation file, read from a folder or from a zip.

The annotation file has a name such as `000000000009.jpg`, but the archive member may be
`train2017/000000000009.jpg`. Therefore each name is searched directly, in a subfolder with the name
of the source, and in the top folder of a zip if there is only one. All names are searched when the
source is opened, so a missing image is reported at the start and not after an hour of training.
"""

import os
import posixpath
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from datasets.archives import ZipArchive
from datasets.errors import CHECK_COMMAND, CorruptImageError, DataError
from datasets.images import read_bytes
from datasets.packed_strings import PackedStrings

__all__ = ["ImageSource", "FolderSource", "ZipSource", "open_images", "find_split"]


class ImageSource(Protocol):
    """Image files by index, in the order of the file names given when the source was opened.

    Attributes:
        path: Folder or zip.
        missing: Indices of the images that the folder or zip lacks.
    """

    path: Path
    missing: Sequence[int]

    def read(self, index: int) -> bytes:
        """Read image file `index`."""
        ...


class FolderSource:
    """Images in a folder.

    Args:
        path: Folder of the images.
        file_names: Names of the N images.
        allow_missing: Accept missing images; reading one is an error then.

    Raises:
        DataError: An image is missing.
    """

    def __init__(
        self, path: Path, file_names: Sequence[str], *, allow_missing: bool = False
    ) -> None:
        self.path = path
        prefixes = ("", f"{path.name}/")
        parents = {posixpath.dirname(name) for name in file_names}
        candidates = (prefix + parent for prefix in prefixes for parent in parents)
        present = set(_list_files(path, candidates))
        names, self.missing = _find(path, file_names, prefixes, present, allow_missing)
        self._names = PackedStrings.pack(names)

    def read(self, index: int) -> bytes:
        """Read image file `index`.

        Raises:
            CorruptImageError: The file cannot be read.
        """
        return read_bytes(self.path / self._names[index])


class ZipSource:
    """Images in a zip, read without unpacking it.

    Args:
        path: Zip of the images.
        file_names: Names of the N images.
        allow_missing: Accept missing images; reading one is an error then.

    Raises:
        DataError: The archive is damaged, or an image is missing.
    """

    def __init__(
        self, path: Path, file_names: Sequence[str], *, allow_missing: bool = False
    ) -> None:
        self.path = path
        self.archive = ZipArchive(path)
        positions = {name: position for position, name in enumerate(self.archive.names)}
        tops = {name.partition("/")[0] for name in positions if "/" in name} - {"__MACOSX"}
        prefixes = ["", f"{path.stem}/", *(f"{top}/" for top in tops if len(tops) == 1)]
        names, self.missing = _find(path, file_names, prefixes, positions, allow_missing)
        self._positions = np.array([positions.get(name, -1) for name in names], dtype=np.int64)

    def read(self, index: int) -> bytes:
        """Read image file `index`.

        Raises:
            CorruptImageError: The archive member is missing or cannot be read.
        """
        position = int(self._positions[index])
        if position < 0:
            raise CorruptImageError(f"{self.path} lacks image number {index}")
        return self.archive.read_at(position)


def open_images(
    path: str | os.PathLike[str], file_names: Sequence[str], *, allow_missing: bool = False
) -> ImageSource:
    """Open the folder or the zip at `path`.

    Args:
        path: Folder or zip of the images.
        file_names: Names of the images in the annotation file.
        allow_missing: List missing images in `missing` instead of raising an error.

    Raises:
        DataError: There is no folder or zip, the zip is damaged, or an image is missing.
    """
    path = Path(path)
    if path.is_dir():
        return FolderSource(path, file_names, allow_missing=allow_missing)
    if path.is_file():
        return ZipSource(path, file_names, allow_missing=allow_missing)
    raise DataError(f"there are no images at {path}: expected a folder or a zip")


def find_split(root: Path, name: str) -> tuple[Path, str]:
    """Find the images of a split: the folder `root/name`, otherwise `root/name.zip`.

    Args:
        root: Folder of the data set.
        name: Name of the split's folder or zip, such as `train2017`.

    Returns:
        The path, and a note for the log if both exist (otherwise an empty string).

    Raises:
        DataError: Neither exists.
    """
    folder, archive = root / name, root / f"{name}.zip"
    # An empty folder may be a leftover or a mount point; it is ignored.
    if folder.is_dir() and any(folder.iterdir()):
        note = f"both {folder} and {archive} exist: the folder is used"
        return folder, note if archive.is_file() else ""
    if archive.is_file():
        return archive, ""
    raise DataError(f"there are no images in {root}: expected the folder {name} or {name}.zip")


def _find(
    path: Path,
    file_names: Sequence[str],
    prefixes: Sequence[str],
    present: Collection[str],
    allow_missing: bool,
) -> tuple[list[str], list[int]]:
    """Return the names with the prefix for which most are present, and the missing indices."""
    best: tuple[list[str], list[int]] | None = None
    for prefix in prefixes:
        names = [posixpath.normpath(prefix + name) for name in file_names]
        missing = [index for index, name in enumerate(names) if name not in present]
        if best is None or len(missing) < len(best[1]):
            best = names, missing
        if not missing:
            break
    assert best is not None
    names, missing = best
    if missing and not allow_missing:
        raise DataError(
            f"{path} lacks the image {names[missing[0]]}, which the annotations name: "
            f"{len(missing)} of {len(file_names)} images are missing; {CHECK_COMMAND}"
        )
    return best


def _list_files(path: Path, folders: Iterable[str]) -> Iterator[str]:
    """Yield the files in the given folders below `path`; missing folders are skipped."""
    for folder in folders:
        try:
            entries = os.listdir(path / folder)  # noqa: PTH208  (names alone, and faster)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise DataError(f"cannot list {path / folder}: {error.strerror}") from error
        yield from (posixpath.normpath(posixpath.join(folder, entry)) for entry in entries)
