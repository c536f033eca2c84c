"""All problems of one annotation file in COCO's format, without its images.

The trainers stop at the first problem; here all are collected, with the same helper functions.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from datasets.check.findings import Finding
from datasets.coco_entries import area_of, find_problem
from datasets.coco_json import category_names_of, describe, read_json, select_images, size_of
from datasets.errors import DataError

__all__ = ["Examined", "examine"]

# Finding of each key of an annotation that is not valid.
_KINDS = {
    "bbox": "invalid boxes",
    "category_id": "objects of unknown categories",
    "iscrowd": "invalid crowds",
}
_UNLISTED = "objects of unlisted images"


@dataclass(frozen=True)
class Examined:
    """The content of an annotation file: N images and M valid objects without crowds.

    Attributes:
        file_names: Names of the N images.
        sizes: Annotated widths and heights in pixels, (N, 2) int64; 0 where unknown.
        categories: Name of each category id.
        rows: Image of each object, (M,) int64.
        category_ids: Category id of each object, (M,) int64.
        boxes: Boxes x, y, width, height in pixels, (M, 4) float64.
        areas: Areas in square pixels, (M,) float32.
        findings: Problems found.
    """

    file_names: list[str]
    sizes: np.ndarray
    categories: dict[int, str]
    rows: np.ndarray
    category_ids: np.ndarray
    boxes: np.ndarray
    areas: np.ndarray
    findings: list[Finding]


def examine(
    path: Path, split: str, *, with_masks: bool, only: Collection[str] | None = None
) -> Examined:
    """Read an annotation file and collect its problems.

    Args:
        path: Path of the JSON file.
        split: Name of the split for the findings.
        with_masks: Check the segmentations, too.
        only: File names of the images to examine; None for all.

    Raises:
        DataError: The file is missing or not a COCO annotation file.
    """
    data = read_json(path)
    try:
        categories = category_names_of(data)
        if only is not None:
            data = select_images(data, only)
        examined = _examine(data, categories, split, with_masks)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path} is not a COCO annotation file: {describe(error)}") from error
    if not examined.file_names:
        raise DataError(f"{path} lists no images")
    return examined


def _examine(
    data: Mapping[str, Any], categories: dict[int, str], split: str, with_masks: bool
) -> Examined:
    """Collect the content and the problems of a parsed annotation file."""
    images = {int(entry["id"]): entry for entry in data["images"]}
    keys = sorted(images)
    row_of = {key: row for row, key in enumerate(keys)}
    names = [str(images[key]["file_name"]) for key in keys]
    bad: dict[str, list[str]] = defaultdict(list)
    rows, objects, crowds = [], [], 0
    for number, entry in enumerate(data["annotations"], 1):
        key = entry.get("id", f"number {number}")
        row = row_of.get(entry["image_id"])
        problem = find_problem(entry, categories, with_masks)
        if with_masks and row is not None and not problem:
            problem = _compare_rle(entry, images[keys[row]])
        if row is None:
            bad[_UNLISTED].append(f"annotation {key}: image {entry['image_id']}")
        elif problem:
            # A problem begins with the name of the key.
            kind = _KINDS.get(problem.partition(" ")[0], "invalid segmentations")
            bad[kind].append(f"annotation {key} of {names[row]}: {problem}")
        elif entry.get("iscrowd", 0):
            crowds += 1
        else:
            rows.append(row)
            objects.append(entry)
    repeated = _repeated(int(entry["id"]) for entry in data["images"])
    return Examined(
        file_names=names,
        sizes=np.array([size_of(images[key]) for key in keys], dtype=np.int64).reshape(-1, 2),
        categories=categories,
        rows=np.array(rows, dtype=np.int64),
        category_ids=np.array([entry["category_id"] for entry in objects], dtype=np.int64),
        boxes=np.array([entry["bbox"] for entry in objects], dtype=np.float64).reshape(-1, 4),
        areas=np.array([area_of(entry) for entry in objects], dtype=np.float32),
        findings=[
            *_invalid(bad, split),
            *_repeats(repeated, _repeated(names), split),
            *_empty_images(len(names), len(set(rows)), [*_without(names, rows)], crowds, split),
        ],
    )


def _invalid(bad: Mapping[str, list[str]], split: str) -> list[Finding]:
    """Return the findings of annotations that are not valid."""
    findings = []
    for kind, cases in sorted(bad.items()):
        level, meaning = "error", "Training stops at the first one."
        if kind == _UNLISTED:
            level, meaning = "warning", "The file does not list their images: they are left out."
        findings.append(Finding(level, kind, split, len(cases), meaning, cases))
    return findings


def _repeats(ids: list[str], names: list[str], split: str) -> list[Finding]:
    """Return the findings of image ids and file names that are used twice."""
    findings = []
    if ids:
        meaning = "Training stops: the objects belong to several images."
        findings.append(Finding("error", "repeated image ids", split, len(ids), meaning, ids))
    if names:
        meaning = "Each entry is an image of its own that lacks the objects of the other."
        findings.append(
            Finding("warning", "repeated file names", split, len(names), meaning, names)
        )
    return findings


def _empty_images(
    count: int, filled: int, empty: list[str], crowds: int, split: str
) -> list[Finding]:
    """Return the findings of images without objects and of crowd annotations."""
    findings = []
    if not filled:
        meaning = "The detector learns to find nothing."
        findings.append(Finding("warning", "no objects", split, 1, meaning))
    elif empty:
        meaning = (
            f"{len(empty) / count:.1%} of the images; they are kept as background. Check that they "
            "are annotated."
        )
        findings.append(
            Finding("note", "images without objects", split, len(empty), meaning, empty)
        )
    if crowds:
        meaning = "Training leaves them out; the evaluation ignores detections inside them."
        findings.append(Finding("note", "crowd annotations", split, crowds, meaning))
    return findings


def _compare_rle(entry: Mapping[str, Any], image: Mapping[str, Any]) -> str:
    """Describe the problem of an RLE of another size than its image; empty if there is none."""
    segmentation = entry.get("segmentation")
    if not isinstance(segmentation, dict) or entry.get("iscrowd", 0):
        return ""
    width, height = size_of(image)
    size = segmentation["size"]
    if width and size != [height, width]:
        return f"RLE size must be {[height, width]} as the image, got {size}"
    return ""


def _without(names: list[str], rows: Collection[int]) -> list[str]:
    """Return the names of the images that have no object."""
    filled = set(rows)
    return [name for row, name in enumerate(names) if row not in filled]


def _repeated(values: Any) -> list[str]:
    """Return the values that occur more than once."""
    return [str(value) for value, count in Counter(values).items() if count > 1]
