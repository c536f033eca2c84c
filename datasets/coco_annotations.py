"""A COCO annotation file (https://cocodataset.org/#format-data) as a few flat arrays.

As Python objects, the 860,000 annotations of COCO's training split need 2 GB, which every worker
would copy. As arrays they need 30 MB, without the segmentations, which are kept only for masks.
Errors in the file are reported here, with the annotation in question.
"""

import json
import logging
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from datasets.coco_entries import area_of, find_problem
from datasets.coco_json import category_names_of, describe, read_json, select_images, size_of
from datasets.errors import CHECK_COMMAND, DataError
from datasets.packed_strings import PackedStrings

__all__ = [
    "CocoAnnotations",
    "read_annotations",
    "report_flat",
    "report_unlisted",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CocoAnnotations:
    """The part of an annotation file used in training: N images, M objects grouped by image.

    Crowd annotations are left out; images without objects are kept.

    Attributes:
        image_ids: Image ids in ascending order, (N,) int64.
        file_names: Names of the N image files.
        sizes: Width and height of the images in pixels, (N, 2) int64; 0 where the file has none.
        starts: Start of each image's objects, (N + 1,) int64. The objects of image i are
            starts[i] to starts[i + 1] - 1.
        boxes: Boxes x, y, width, height in pixels, (M, 4) float32.
        categories: Category ids, (M,) int64.
        areas: Areas in square pixels, (M,) float32; the area of the box if the file has none.
        segmentations: M segmentations as JSON; None without masks.
        category_names: Name of each category id, for all categories of the file.
        placeholder: Name of a category of the file that is left out, see `category_names_of`.
        unlisted: Number of annotations of images that the file does not list.
    """

    image_ids: np.ndarray
    file_names: PackedStrings
    sizes: np.ndarray
    starts: np.ndarray
    boxes: np.ndarray
    categories: np.ndarray
    areas: np.ndarray
    segmentations: PackedStrings | None
    category_names: Mapping[int, str]
    placeholder: str | None = None
    unlisted: int = 0


def read_annotations(
    path: str | os.PathLike[str],
    *,
    with_masks: bool = False,
    only: Collection[str] | None = None,
) -> CocoAnnotations:
    """Read and check an annotation file.

    Args:
        path: Path of the JSON file.
        with_masks: Keep the segmentations.
        only: File names of the images to keep; None for all.

    Raises:
        DataError: The file is missing or not a COCO annotation file; two images have the same id;
            no annotation belongs to an image; a box is not four finite numbers; a category is
            unknown; or, with `with_masks`, a segmentation is missing or
            damaged, or the size of an image is missing.
    """
    path = Path(path)
    data = read_json(path)
    try:
        names = category_names_of(data)
        if only is not None:
            data = select_images(data, only)
        images = {int(entry["id"]): str(entry["file_name"]) for entry in data["images"]}
        sizes = {int(entry["id"]): size_of(entry) for entry in data["images"]}
        for kind, listed in (("images", images), ("categories", names)):
            if not listed:
                raise DataError(f"{path} lists no {kind}")
        if len(images) < len(data["images"]):
            repeated = _first_repeated(int(entry["id"]) for entry in data["images"])
            raise DataError(
                f"{path}: image ids must be different, got {repeated} twice; {CHECK_COMMAND}"
            )
        if with_masks:
            _check_sizes(path, data["images"])
        rows, objects, unlisted = _collect(path, data["annotations"], images, names, with_masks)
        file_names = PackedStrings.pack(images[key] for key in sorted(images))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise DataError(f"{path} is not a COCO annotation file: {describe(error)}") from error

    order = np.argsort(rows, kind="stable")
    objects = [objects[position] for position in order]
    boxes = np.array([entry["bbox"] for entry in objects], dtype=np.float32).reshape(-1, 4)
    report_flat(path, boxes)
    segmentations = None
    if with_masks:
        segmentations = PackedStrings.pack(json.dumps(entry["segmentation"]) for entry in objects)
    return CocoAnnotations(
        image_ids=np.array(sorted(images), dtype=np.int64),
        file_names=file_names,
        sizes=np.array([sizes[key] for key in sorted(images)], dtype=np.int64),
        starts=np.searchsorted(rows[order], np.arange(len(images) + 1)),
        boxes=boxes,
        categories=np.array([entry["category_id"] for entry in objects], dtype=np.int64),
        areas=np.array([area_of(entry) for entry in objects], dtype=np.float32),
        segmentations=segmentations,
        category_names=names,
        placeholder=next(
            (str(e["name"]) for e in data["categories"] if int(e["id"]) not in names), None
        ),
        unlisted=unlisted,
    )


def _first_repeated(numbers: Iterable[int]) -> int | None:
    """Return the first number that was there before; None if all differ."""
    seen: set[int] = set()
    for number in numbers:
        if number in seen:
            return number
        seen.add(number)
    return None


def _check_sizes(path: Path, images: Sequence[Mapping[str, Any]]) -> None:
    """Raise DataError unless every image has a size, which pycocotools needs for the masks."""
    for entry in images:
        if "height" not in entry or "width" not in entry:
            raise DataError(f"{path}: image {entry['id']} lacks height or width, needed for masks")
        size = [entry["height"], entry["width"]]
        if not all(type(side) is int and side > 0 for side in size):
            raise DataError(
                f"{path}: image {entry['id']}: height and width must be positive integers, "
                f"got {size}; {CHECK_COMMAND}"
            )


def _collect(
    path: Path,
    annotations: Sequence[Mapping[str, Any]],
    images: Mapping[int, str],
    names: Mapping[int, str],
    with_masks: bool,
) -> tuple[np.ndarray, list[Mapping[str, Any]], int]:
    """Check all annotations.

    Returns:
        The image row of each object, the objects (no crowds), and the number of annotations of
        images that the file does not list.
    """
    row_of = {key: row for row, key in enumerate(sorted(images))}
    rows: list[int] = []
    objects: list[Mapping[str, Any]] = []
    without_image = 0
    for number, entry in enumerate(annotations, 1):
        row = row_of.get(entry["image_id"])
        if row is None:
            without_image += 1
            continue
        problem = find_problem(entry, names, with_masks)
        if problem:
            key = entry.get("id", f"number {number}")
            raise DataError(f"{path}: annotation {key}: {problem}; {CHECK_COMMAND}")
        if not entry.get("iscrowd", 0):
            rows.append(row)
            objects.append(entry)
    if without_image and without_image == len(annotations):
        raise DataError(
            f"{path}: none of the {without_image} annotations belongs to an image that the file "
            f"lists; {CHECK_COMMAND}"
        )
    report_unlisted(path, without_image)
    return np.array(rows, dtype=np.int64), objects, without_image


def report_flat(path: Path, boxes: np.ndarray) -> None:
    """Log how many of the boxes (M, 4) have no width or height."""
    flat = int(np.count_nonzero((boxes[:, 2:] <= 0).any(axis=1)))
    if flat:
        logger.info("%s: %d boxes without width or height are left out", path, flat)


def report_unlisted(path: Path, count: int) -> None:
    """Warn about annotations of images that the file does not list."""
    if count:
        logger.warning(
            "%s: %d annotations belong to images that the file does not list", path, count
        )
