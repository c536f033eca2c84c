"""ImageNet and data with the same layout: one folder per class, on disk or inside a tar.

The class of an image is the name of its parent folder. Classes are numbered in sorted order; the
validation split gets the class names of the training split, so the numbers agree. Image names are
sorted, so a folder and a tar of the same files give the same samples in the same order.

torchvision's ImageFolder uses the topmost folder as the class, not the parent folder. For data with
one level of folders, such as ImageNet, both are the same.
"""

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from datasets.archives import TarArchive
from datasets.errors import CHECK_COMMAND, DataError
from datasets.images import LabeledImages, is_image_name, read_bytes
from datasets.packed_strings import PackedStrings
from datasets.saved_split import SplitOptions, split_images

__all__ = ["SPLIT_NAMES", "Split", "Transform", "FolderImages", "TarImages", "build_imagenet"]

Split = Literal["train", "val"]
SPLIT_NAMES = {"train": ("train",), "val": ("val", "valid", "validation")}
Transform = Callable[[Image.Image], Any]

logger = logging.getLogger(__name__)


class FolderImages(LabeledImages):
    """Images in `root/<class>/`.

    Args:
        root: Folder of the split.
        transform: Function applied to the RGB image.
        classes: Class names in the order of their numbers; by default the folder names, sorted.

    Raises:
        DataError: The folder is missing, has no images, or has a class that is not in `classes`.
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
        super().__init__(root, PackedStrings.pack(names), targets, found, transform)

    def read(self, index: int) -> bytes:
        """Read the file of image `index`."""
        return read_bytes(self.root / self.names[index])


class TarImages(LabeledImages):
    """Images in an uncompressed tar, read without unpacking it.

    Args:
        path: Tar of the split.
        transform: Function applied to the RGB image.
        classes: Class names in the order of their numbers; by default the folder names, sorted.

    Raises:
        DataError: The tar is missing or damaged, has no images, or has a class that is not in
            `classes`.
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
        super().__init__(path, PackedStrings.pack(names), targets, found, transform)

    def select(self, positions: np.ndarray) -> "TarImages":
        """Return the images at the given positions, with the same classes."""
        chosen = super().select(positions)
        chosen._positions = self._positions[positions]
        return chosen

    def read(self, index: int) -> bytes:
        """Read the archive member of image `index`."""
        return self.archive.read_at(int(self._positions[index]))


def build_imagenet(
    data_path: str | os.PathLike[str],
    split: Split,
    *,
    load_tar: bool = False,
    transform: Transform | None = None,
    classes: Sequence[str] | None = None,
    train_val_split: SplitOptions | None = None,
) -> LabeledImages:
    """Open one split: the folder `data_path/<split>`, or `data_path/<split>.tar` with `load_tar`.

    The validation split may also be called `valid` or `validation`.

    Args:
        data_path: Folder of the splits.
        split: `train` or `val`.
        load_tar: Read the tar instead of the folder.
        transform: Function applied to the RGB image.
        classes: Class names of the training split, so that validation uses the same numbers.
        train_val_split: Use a part of each class of the training split for validation, see
            `saved_split`. Without `train`, the class folders are expected in `data_path`.

    Raises:
        DataError: The split is missing or damaged, has no images, or has a class that is not in
            `classes`; or `train_val_split` is given for data that has a validation split.
    """
    root = Path(data_path)
    if train_val_split is not None:
        return _open_part(root, split, load_tar, transform, classes, train_val_split)
    folder, tar = _find(root, split)
    if load_tar:
        if not tar.exists() and folder.is_dir():
            raise DataError(f"there is no {tar}, but the folder {folder} exists: drop --load-tar")
        return TarImages(tar, transform, classes)
    if not folder.exists() and tar.is_file():
        raise DataError(f"there is no folder {folder}, but {tar} exists: add --load-tar")
    # A folder with neither split has its class folders at the top, as photographs often have.
    unsplit = not any(path.exists() for path in _find(root, "val"))
    if unsplit and not folder.exists() and root.is_dir():
        raise DataError(
            f"there is no folder {folder}: expected {folder}/<class>/<image>.jpg, or "
            "--train_val_split 0.2 to use a part of the training images for validation"
        )
    return FolderImages(folder, transform, classes)


def _find(root: Path, split: Split) -> tuple[Path, Path]:
    """Return folder and tar of a split, by the first of its names that exists."""
    pairs = [(root / name, root / f"{name}.tar") for name in SPLIT_NAMES[split]]
    found = next((pair for pair in pairs if any(path.exists() for path in pair)), pairs[0])
    if found is not pairs[0]:
        logger.info("%s: images from %s", split, next(path for path in found if path.exists()))
    return found


def _open_part(
    root: Path,
    split: Split,
    load_tar: bool,
    transform: Transform | None,
    classes: Sequence[str] | None,
    options: SplitOptions,
) -> LabeledImages:
    """Open the part of the training images that belongs to a split."""
    for path in _find(root, "val"):
        if path.exists():
            raise DataError(f"{path} is a validation split: drop --train_val_split")
    if load_tar or any(path.exists() for path in _find(root, "train")):
        images = build_imagenet(
            root, "train", load_tar=load_tar, transform=transform, classes=classes
        )
    else:
        images = FolderImages(root, transform, classes)
    names = list(images.names)
    groups = [images.classes[target] for target in images.targets.tolist()]
    val = split_images(images.source, root, names, options, groups)
    chosen = [i for i, name in enumerate(names) if (name in val) == (split == "val")]
    return images.select(np.array(chosen, dtype=np.int64))


def _walk(root: Path) -> Iterable[str]:
    """Yield the files below `root` as relative names with forward slashes."""

    def fail(error: OSError) -> None:
        raise DataError(f"cannot list {error.filename}: {error.strerror}") from error

    for folder, _, files in os.walk(root, onerror=fail, followlinks=True):
        relative = Path(folder).relative_to(root).as_posix()
        prefix = "" if relative == "." else f"{relative}/"
        yield from (f"{prefix}{name}" for name in files)


def _is_sample(name: str) -> bool:
    """Return whether a name is an image inside a folder; at the top level it has no class."""
    return "/" in name and is_image_name(name)


def _number_classes(
    names: Sequence[str], classes: Sequence[str] | None, source: Path
) -> tuple[np.ndarray, list[str]]:
    """Return the class number of every name, (N,) int64, and the class names."""
    if not names:
        raise DataError(f"there are no images in {source}: expected <class>/<image>.jpg inside")
    parents = [name.rsplit("/", 2)[-2] for name in names]
    found = sorted(set(parents))
    numbered = found if classes is None else list(classes)
    unknown = sorted(set(found) - set(numbered))
    if unknown:
        shown = ", ".join(unknown[:3]) + (", ..." if len(unknown) > 3 else "")
        raise DataError(
            f"{source} has {len(unknown)} class(es) that train, or the checkpoint, lacks: "
            f"{shown}; {CHECK_COMMAND}"
        )
    number = {name: i for i, name in enumerate(numbered)}
    return np.array([number[parent] for parent in parents], dtype=np.int64), numbered
