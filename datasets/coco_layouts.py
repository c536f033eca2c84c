"""The files of a split in the layouts in which data in COCO's format is exported.

| layout        | annotations                              | images                          |
|---------------|------------------------------------------|---------------------------------|
| COCO          | `annotations/instances_train2017.json`   | `train2017/` or `train2017.zip` |
| Roboflow      | `train/_annotations.coco.json`           | `train/`                        |
| CVAT, subsets | `annotations/instances_train.json`       | `images/train/` or `images/`    |
| CVAT          | `annotations/instances_default.json`     | `images/` or `images/default/`  |
| Label Studio  | `result.json`, or the only JSON file     | `images/`                       |

The validation split is called `val`, `valid` or `validation`. The last two layouts have one file
for all images, from which a validation split is taken by a seed.
"""

import logging
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from datasets.coco_json import describe, read_json
from datasets.errors import DataError
from datasets.image_sources import find_split
from datasets.imagenet import SPLIT_NAMES
from datasets.saved_split import SplitOptions, split_images

__all__ = ["CocoFiles", "find_coco"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CocoFiles:
    """The files of one split.

    Attributes:
        images: Folder or zip of the images.
        annotations: JSON file in COCO's format.
        only: File names of the images of this split; None for all images of the file.
    """

    images: Path
    annotations: Path
    only: Collection[str] | None = None


def find_coco(
    split: Literal["train", "val"],
    coco_path: str | os.PathLike[str] | None = None,
    *,
    images: str | os.PathLike[str] | None = None,
    annotations: str | os.PathLike[str] | None = None,
    train_val_split: SplitOptions | None = None,
) -> CocoFiles:
    """Find the files of one split; see `build_coco` for the arguments.

    Raises:
        DataError: A folder, the images or the annotations are missing, or no path to them is given,
            or `train_val_split` is given for data that has a validation split.
        ValueError: The split is unknown.
    """
    if split not in SPLIT_NAMES:
        raise ValueError(f"split must be train or val, got {split!r}")
    if coco_path is None:
        if images is None or annotations is None:
            raise DataError(
                f"there is no data for {split}: expected --coco_path, or images and annotations"
                + (", or --train_val_split" if split == "val" else "")
            )
        files = CocoFiles(Path(images), Path(annotations))
        return files if train_val_split is None else _part(files, split, train_val_split)
    root = Path(coco_path)
    if not root.is_dir():
        raise DataError(f"there is no folder {root}: expected COCO in it")
    if images is None and annotations is None:
        files = _find_exported(root, split, train_val_split)
        if files is not None:
            logger.info("%s: images from %s, %s", split, files.images, files.annotations)
            return files
    annotations = annotations or root / "annotations" / f"instances_{split}2017.json"
    if images is None:
        images, note = find_split(root, f"{split}2017")
        logger.info(note or f"{split}: images from {images}")
    files = CocoFiles(Path(images), Path(annotations))
    return files if train_val_split is None else _part(files, split, train_val_split)


def _find_exported(root: Path, split: str, options: SplitOptions | None) -> CocoFiles | None:
    """Find the files of a split in a layout other than COCO's; None if there are none."""
    if options is not None:
        if (found := _find_subset(root, "val")) or _is_coco(root, "val"):
            place = found.annotations if found else root
            raise DataError(f"{place} has a validation split: drop --train_val_split")
        whole = _find_subset(root, "train") or _find_single(root)
        if whole is None and _is_coco(root, "train"):
            images, _ = find_split(root, "train2017")
            whole = CocoFiles(images, root / "annotations" / "instances_train2017.json")
        return None if whole is None else _part(whole, split, options)
    if _is_coco(root, split):
        return None
    found = _find_subset(root, split)
    if found is None:
        whole = _find_single(root) or (_find_subset(root, "train") if split == "val" else None)
        if whole is not None:
            raise DataError(
                f"{root} has no annotations of {split}: --train_val_split 0.2 uses a part of "
                f"{whole.annotations} for validation"
            )
    return found


def _is_coco(root: Path, split: str) -> bool:
    """Return whether a folder has a split in COCO's layout, at least in part."""
    parts = (f"annotations/instances_{split}2017.json", f"{split}2017", f"{split}2017.zip")
    return any((root / part).exists() for part in parts)


def _find_subset(root: Path, split: str) -> CocoFiles | None:
    """Find a split that has an annotation file of its own."""
    for name in SPLIT_NAMES[split]:
        file = root / name / "_annotations.coco.json"
        if file.is_file():
            return CocoFiles(file.parent, file)
    for file in _json_files(root / "annotations"):
        subset = file.stem.removeprefix("instances_")
        if subset.lower() in SPLIT_NAMES[split]:
            return _with_images(file, root, subset)
    return None


def _find_single(root: Path) -> CocoFiles | None:
    """Find the only annotation file of a folder."""
    for folder in (root, root / "annotations"):
        files = list(_json_files(folder))
        if len(files) == 1:
            return _with_images(files[0], root, files[0].stem.removeprefix("instances_"))
    return None


def _json_files(folder: Path) -> Iterator[Path]:
    """Yield the JSON files of a folder that may be annotations, sorted."""
    for file in sorted(folder.glob("*.json")):
        if not file.name.startswith((".", "train_val_split_")):
            yield file


def _with_images(file: Path, root: Path, subset: str) -> CocoFiles:
    """Find the folder of the images of an annotation file, by its first image."""
    candidates = [root / "images" / subset, root / subset, root / "images", root]
    name = next(iter(_file_names(file)), "")
    folder = next((folder for folder in candidates if (folder / name).is_file()), None)
    if folder is None:
        raise DataError(
            f"there is no image {name} of {file} in {root}: expected it in images, {subset} or "
            f"images/{subset}"
        )
    return CocoFiles(folder, file)


def _file_names(file: Path) -> list[str]:
    """Read the names of the images of an annotation file."""
    try:
        return [str(entry["file_name"]) for entry in read_json(file)["images"]]
    except (KeyError, TypeError) as error:
        raise DataError(f"{file} is not a COCO annotation file: {describe(error)}") from error


def _part(files: CocoFiles, split: str, options: SplitOptions) -> CocoFiles:
    """Return the files with the image names of one split."""
    names = _file_names(files.annotations)
    val = split_images(files.annotations, files.annotations.parent, names, options)
    return replace(files, only=val if split == "val" else frozenset(names) - val)
