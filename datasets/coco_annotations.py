"""A COCO annotation file (https://cocodataset.org/#format-data) as a few flat arrays.

The 860,000 annotations of COCO's training split are 2 GB as Python objects, which every worker
would copy. As arrays they are 30 MB, polygons left out unless masks are wanted. What is wrong with
the file is told here, with the annotation that it is about.
"""

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from datasets.errors import DataError
from datasets.names import PackedNames

logger = logging.getLogger(__name__)

# COCO numbers its 80 categories up to 90, with gaps; published models have 91 classes.
_COCO_IDS = set(range(1, 91)) - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}


@dataclass(frozen=True)
class CocoAnnotations:
    """What training needs of an annotation file: N images, M objects grouped by image.

    Crowds are left out; images without objects are kept.

    Attributes:
        image_ids: (N,) int64, ascending.
        file_names: N names of image files.
        starts: (N + 1,) int64: image i has the objects from starts[i] to starts[i + 1].
        boxes: (M, 4) float32, x, y, width, height in pixels.
        categories: (M,) int64, category ids.
        areas: (M,) float32, square pixels; that of the box where the file has none.
        segmentations: M segmentations as JSON; None where masks are not wanted.
        category_names: Category id to name, all categories of the file.
    """

    image_ids: np.ndarray
    file_names: PackedNames
    starts: np.ndarray
    boxes: np.ndarray
    categories: np.ndarray
    areas: np.ndarray
    segmentations: PackedNames | None
    category_names: Mapping[int, str]


def read_annotations(path: str | os.PathLike[str], *, with_masks: bool = False) -> CocoAnnotations:
    """Reads and checks an annotation file.

    Args:
        path: The JSON file.
        with_masks: Keep the segmentations.

    Raises:
        DataError: The file is missing or no COCO annotation file; a box is not four finite
            numbers, a category is unknown, or with `with_masks` a segmentation or an image's size
            is missing.
    """
    path = Path(path)
    data = read_json(path)
    try:
        names = {int(entry["id"]): str(entry["name"]) for entry in data["categories"]}
        images = {int(entry["id"]): str(entry["file_name"]) for entry in data["images"]}
        for kind, listed in (("images", images), ("categories", names)):
            if not listed:
                raise DataError(f"{path} lists no {kind}")
        if with_masks:
            _check_sizes(path, data["images"])
        rows, objects = _collect(path, data["annotations"], images, names, with_masks)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path} is no COCO annotation file: {_describe(error)}") from error

    order = np.argsort(rows, kind="stable")
    objects = [objects[place] for place in order]
    boxes = np.array([entry["bbox"] for entry in objects], dtype=np.float32).reshape(-1, 4)
    flat = int(np.count_nonzero((boxes[:, 2:] <= 0).any(axis=1)))
    if flat:
        logger.info("%s: %d boxes without width or height are left out", path, flat)
    segmentations = None
    if with_masks:
        segmentations = PackedNames.pack(json.dumps(entry["segmentation"]) for entry in objects)
    return CocoAnnotations(
        image_ids=np.array(sorted(images), dtype=np.int64),
        file_names=PackedNames.pack(images[key] for key in sorted(images)),
        starts=np.searchsorted(rows[order], np.arange(len(images) + 1)),
        boxes=boxes,
        categories=np.array([entry["category_id"] for entry in objects], dtype=np.int64),
        areas=np.array([_area(entry) for entry in objects], dtype=np.float32),
        segmentations=segmentations,
        category_names=names,
    )


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file that holds an object.

    Raises:
        DataError: The file is missing, damaged or holds something else.
    """
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"there is no annotation file {path}") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path} is truncated, damaged or not JSON: {error}") from error
    if not isinstance(data, dict):
        raise DataError(f"{path} is no COCO annotation file: it holds no object at its top")
    return data


def label_map_of(category_names: Mapping[int, str]) -> dict[int, int]:
    """Numbers categories: returns the category id of each label.

    COCO's own categories keep their published numbers, 91 classes with gaps, so that published
    models fit; any other set is numbered from 0 without gaps, in the order of the ids.
    """
    if set(category_names) == _COCO_IDS:
        return {number: number for number in range(91)}
    return dict(enumerate(sorted(category_names)))


def _check_sizes(path: Path, images: Sequence[Mapping[str, Any]]) -> None:
    """pycocotools draws the true masks by the sizes that the file gives."""
    for entry in images:
        if "height" not in entry or "width" not in entry:
            raise DataError(f"{path}: image {entry['id']} has no height and width: masks need them")


def _collect(
    path: Path,
    annotations: Sequence[Mapping[str, Any]],
    images: Mapping[int, str],
    names: Mapping[int, str],
    with_masks: bool,
) -> tuple[np.ndarray, list[Mapping[str, Any]]]:
    """Checks the annotations; returns those that are no crowds, and the row of their image."""
    row_of = {key: row for row, key in enumerate(sorted(images))}
    rows: list[int] = []
    objects: list[Mapping[str, Any]] = []
    strays = 0
    for number, entry in enumerate(annotations, 1):
        row = row_of.get(entry["image_id"])
        if row is None:
            strays += 1
            continue
        flaw = _flaw(entry, names, with_masks)
        if flaw:
            raise DataError(f"{path}: annotation {entry.get('id', f'number {number}')} {flaw}")
        if not entry.get("iscrowd", 0):
            rows.append(row)
            objects.append(entry)
    if strays:
        logger.warning("%s: %d annotations are of images that it does not list", path, strays)
    return np.array(rows, dtype=np.int64), objects


def _flaw(entry: Mapping[str, Any], names: Mapping[int, str], with_masks: bool) -> str:
    """Says what is wrong with an annotation; empty where nothing is."""
    box = entry.get("bbox")
    if not (isinstance(box, list) and len(box) == 4 and _finite(box)):
        return f"has the bbox {box}: expected four finite numbers, x, y, width and height"
    if entry.get("category_id") not in names:
        return f"has the category {entry.get('category_id')!r}, which the file does not list"
    if not with_masks or entry.get("iscrowd", 0):
        return ""
    shape = entry.get("segmentation")
    if not shape:
        return "has no segmentation: masks need one"
    if isinstance(shape, dict):
        return "" if {"counts", "size"} <= set(shape) else "has an RLE without counts or size"
    if isinstance(shape, list) and all(isinstance(part, list) and _finite(part) for part in shape):
        return ""
    return "has a segmentation that is neither polygons of finite numbers nor RLE"


def _finite(numbers: list[Any]) -> bool:
    try:
        return math.isfinite(math.fsum(numbers))
    except (TypeError, ValueError, OverflowError):
        return False


def _area(entry: Mapping[str, Any]) -> float:
    area = entry.get("area")
    if isinstance(area, (int, float)) and math.isfinite(area):
        return float(area)
    return float(entry["bbox"][2] * entry["bbox"][3])


def _describe(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)
