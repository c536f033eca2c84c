"""ImageNet and data laid out like it: class folders on disk, or the same tree inside a tar.

An image's class is the name of its parent folder; classes are numbered in sorted order (of the
training split, when the validation split is told its classes). Names are sorted, so a folder and
a tar of the same tree give the same samples in the same order. torchvision's ImageFolder takes
the topmost folder instead of the parent; for two levels, as in ImageNet, that is the same.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from datasets.archives import TarArchive
from datasets.errors import DataError
from datasets.images import LabeledImages, is_image_name, read_bytes
from datasets.names import PackedNames

Split = Literal["train", "val"]
Transform = Callable[[Image.Image], Any]


class FolderImages(LabeledImages):
    """Images in `root/<class>/`.

    Args:
        root: The split's folder.
        transform: Applied to the RGB image.
        classes: Class names in the order of their numbers; by default those found, sorted.

    Raises:
        DataError: No such folder, no image in it, or a class that `classes` lacks.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        transform: Transform | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise DataError(f"there is no folder {root}: expected {root}/<class>/<image>.jpg")
        names = [name for name in sorted(_walk(self.root)) if _is_sample(name)]
        targets, found = _number_classes(names, classes, self.root)
        super().__init__(root, PackedNames.pack(names), targets, found, transform)

    def _read(self, index: int) -> bytes:
        return read_bytes(self.root / self.names[index])


class TarImages(LabeledImages):
    """Images of an uncompressed tar, read in place.

    Args:
        path: The split's archive.
        transform: Applied to the RGB image.
        classes: Class names in the order of their numbers; by default those found, sorted.

    Raises:
        DataError: No such archive, a damaged one, no image in it, or a class that `classes` lacks.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        transform: Transform | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        self.archive = TarArchive(path)
        kept = [(i, name) for i, name in enumerate(self.archive.names) if _is_sample(name)]
        self._positions = np.array([position for position, _ in kept], dtype=np.int64)
        names = [name for _, name in kept]
        targets, found = _number_classes(names, classes, self.archive.path)
        super().__init__(path, PackedNames.pack(names), targets, found, transform)

    def _read(self, index: int) -> bytes:
        return self.archive.read_at(int(self._positions[index]))


def build_imagenet(
    data_path: str | os.PathLike[str],
    split: Split,
    *,
    load_tar: bool = False,
    transform: Transform | None = None,
    classes: Sequence[str] | None = None,
) -> LabeledImages:
    """Opens one split: the folder `data_path/<split>`, or `data_path/<split>.tar` with `load_tar`.

    Args:
        data_path: Folder of the splits.
        split: `train` or `val`.
        load_tar: Read the tar in place instead of the folder.
        transform: Applied to the RGB image.
        classes: The training split's classes, so that validation is numbered alike.

    Raises:
        DataError: As `FolderImages` and `TarImages`.
    """
    folder, tar = Path(data_path) / split, Path(data_path) / f"{split}.tar"
    if load_tar:
        if not tar.exists() and folder.is_dir():
            raise DataError(f"there is no {tar}; the folder {folder} is there: drop --load-tar")
        return TarImages(tar, transform, classes)
    if not folder.exists() and tar.is_file():
        raise DataError(f"there is no folder {folder}; {tar} is there: add --load-tar")
    return FolderImages(folder, transform, classes)


def _walk(root: Path) -> Iterable[str]:
    """Yields the files below `root` as relative names with forward slashes."""

    def fail(error: OSError) -> None:
        raise DataError(f"cannot list {error.filename}: {error.strerror}") from error

    for folder, _, files in os.walk(root, onerror=fail, followlinks=True):
        relative = Path(folder).relative_to(root).as_posix()
        prefix = "" if relative == "." else f"{relative}/"
        yield from (f"{prefix}{name}" for name in files)


def _is_sample(name: str) -> bool:
    """An image with a parent folder: one that lies loose at the top has no class."""
    return "/" in name and is_image_name(name)


def _number_classes(
    names: Sequence[str], classes: Sequence[str] | None, source: Path
) -> tuple[np.ndarray, list[str]]:
    """Returns the class number of every name, (N,) int64, and the class names."""
    if not names:
        raise DataError(f"no images in {source}: expected <class>/<image>.jpg inside")
    parents = [name.rsplit("/", 2)[-2] for name in names]
    found = sorted(set(parents))
    numbered = found if classes is None else list(classes)
    unknown = sorted(set(found) - set(numbered))
    if unknown:
        shown = ", ".join(unknown[:3]) + (", ..." if len(unknown) > 3 else "")
        raise DataError(f"{source} has {len(unknown)} class(es) that train lacks: {shown}")
    number = {name: i for i, name in enumerate(numbered)}
    return np.array([number[parent] for parent in parents], dtype=np.int64), numbered
