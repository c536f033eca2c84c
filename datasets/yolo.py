"""A YOLO data set (https://docs.ultralytics.com/datasets/detect) as annotations in COCO's format.

A data set has a YAML file with the class names and the places of the images, and one text file for
each image: its path has `labels` in place of the last `images`. A line of it is a box,
`class x y width height` with the center, or a polygon, `class x1 y1 x2 y2 x3 y3 ...`, all relative
to the size of the image. The sizes and boxes are those of the upright view of an image with EXIF
rotation, as in YOLO.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from datasets.errors import DataError
from datasets.images import DECODING_ERRORS, is_image_name, orientation_of

__all__ = ["YoloData", "convert_split", "read_yolo"]

_SPLITS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}


@dataclass(frozen=True)
class YoloData:
    """The content of the YAML file of a data set.

    Attributes:
        root: Folder that relative paths begin at.
        names: Name of each class number.
        places: Folders or lists of images of each split.
        keypoints: True if lines have keypoints after the box, which are left out.
    """

    root: Path
    names: dict[int, str]
    places: dict[str, list[Path]]
    keypoints: bool = False


@dataclass
class _Content:
    """The annotation file while it is built."""

    images: list[dict[str, Any]] = field(default_factory=list)
    annotations: list[dict[str, Any]] = field(default_factory=list)


def read_yolo(path: Path) -> YoloData:
    """Read the YAML file of a data set.

    Args:
        path: The file, or the folder of `data.yaml`.

    Raises:
        DataError: The file is missing or damaged, or a folder that it names is missing.
    """
    file = path / "data.yaml" if path.is_dir() else path
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict) or not isinstance(data.get("names"), list | dict):
        raise DataError(f"{file} must have names, a list or mapping of class names")
    names = data["names"]
    root = _find_root(file, data.get("path"))
    places = {
        split: [_find_place(root, place, file) for place in _as_list(data[key])]
        for split, keys in _SPLITS.items()
        for key in keys
        if data.get(key)
    }
    if "train" not in places:
        raise DataError(f"{file} must have train, the folder of the training images")
    return YoloData(
        root,
        {int(key): str(name) for key, name in _items(names)},
        places,
        keypoints="kpt_shape" in data,
    )


def convert_split(data: YoloData, split: str, base: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the annotations of a split in COCO's format, and the images that cannot be read.

    Category ids are class numbers plus 1, as COCO's ids begin at 1.

    Args:
        data: The data set.
        split: `train`, `val` or `test`, one of `data.places`.
        base: Folder that the file names are relative to.

    Raises:
        DataError: There are no images, or a line of a label file is not valid.
    """
    content, unreadable = _Content(), []
    paths = sorted({path for place in data.places[split] for path in _images(place, data.root)})
    for path in paths:
        try:
            with Image.open(path) as image:
                width, height = image.size
                if orientation_of(image) >= 5:
                    width, height = height, width
        except DECODING_ERRORS as error:
            unreadable.append(f"{path}: {error}")
            continue
        key = len(content.images) + 1
        name = Path(os.path.relpath(path, base)).as_posix()
        content.images.append({"id": key, "file_name": name, "width": width, "height": height})
        for entry in _read_labels(_label_file(path), data, width, height):
            number = len(content.annotations) + 1
            content.annotations.append({"id": number, "image_id": key, **entry})
    if not content.images:
        raise DataError(f"there are no readable images of {split} in {data.places[split][0]}")
    categories = [{"id": key + 1, "name": name} for key, name in sorted(data.names.items())]
    return {
        "images": content.images,
        "annotations": content.annotations,
        "categories": categories,
    }, unreadable


def _find_root(file: Path, path: Any) -> Path:
    """Return the folder that the places are relative to."""
    if not path:
        return file.parent
    given = Path(str(path))
    candidates = [file.parent / given, given]
    # Many files name the folder on the machine of their author.
    return next((folder for folder in candidates if folder.is_dir()), file.parent)


def _find_place(root: Path, place: Any, file: Path) -> Path:
    """Return the folder or list of images that the YAML file names."""
    name = str(place)
    # Roboflow writes ../train/images, although the folder is next to the YAML file.
    candidates = [root / name, root / name.removeprefix("../")]
    for path in candidates:
        if path.exists():
            return path
    raise DataError(f"there is no {candidates[0]}, which {file} names")


def _images(place: Path, root: Path) -> Iterator[Path]:
    """Yield the images in a folder, or those that a text file lists."""
    if place.is_dir():
        yield from (path for path in place.rglob("*") if is_image_name(path.name))
        return
    for line in place.read_text(encoding="utf-8").splitlines():
        name = line.strip()
        if name:
            paths = [place.parent / name, root / name]
            yield next((path for path in paths if path.exists()), paths[0])


def _label_file(path: Path) -> Path:
    """Return the label file of an image."""
    parts = list(path.parts)
    if "images" in parts[:-1]:
        last = len(parts) - 2 - parts[-2::-1].index("images")
        parts[last] = "labels"
    return Path(*parts).with_suffix(".txt")


def _read_labels(file: Path, data: YoloData, width: int, height: int) -> Iterator[dict[str, Any]]:
    """Yield the objects of a label file; an image without one has no objects."""
    if not file.is_file():
        return
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        words = line.split()
        if not words:
            continue
        try:
            category, values = int(float(words[0])), [float(word) for word in words[1:]]
            yield _object(category, values, data, width, height)
        except ValueError as error:
            raise DataError(f"{file}, line {number}: {error}, got {line!r}") from error


def _object(
    category: int, values: Sequence[float], data: YoloData, width: int, height: int
) -> dict[str, Any]:
    """Convert a line of a label file, in pixels."""
    if category not in data.names:
        raise ValueError(f"class must be one of the {len(data.names)} classes of the YAML file")
    if not all(map(math.isfinite, values)):
        raise ValueError("numbers must be finite")
    if len(values) == 4 or (data.keypoints and len(values) > 4):
        x, y, w, h = values[:4]
        box = [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]
        entry = {"bbox": box, "area": box[2] * box[3]}
    elif len(values) >= 6 and len(values) % 2 == 0:
        xs = [x * width for x in values[0::2]]
        ys = [y * height for y in values[1::2]]
        corners = list(zip(xs, ys, strict=True))
        shifted = [*corners[1:], corners[0]]
        # The area of a polygon by the shoelace formula.
        doubled = sum(
            x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in zip(corners, shifted, strict=True)
        )
        entry = {
            "bbox": [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)],
            "area": abs(doubled) / 2,
            "segmentation": [[value for corner in corners for value in corner]],
        }
    else:
        raise ValueError("a line must be a class and 4 numbers, or the corners of a polygon")
    return {"category_id": category + 1, "iscrowd": 0, **entry}


def _as_list(value: Any) -> list[Any]:
    """Return a list as it is, and anything else as a list of one."""
    return value if isinstance(value, list) else [value]


def _items(names: Sequence[str] | Mapping[int, str]) -> Iterator[tuple[int, str]]:
    """Yield class number and name."""
    yield from names.items() if isinstance(names, Mapping) else enumerate(names)
