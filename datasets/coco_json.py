"""Reading of a COCO annotation file as JSON: its categories, sizes, and a part of its images."""

import contextlib
import gc
import json
import logging
import reprlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets.errors import DataError

__all__ = [
    "category_names_of",
    "describe",
    "label_map_of",
    "read_json",
    "report_placeholder",
    "select_images",
    "size_of",
]

logger = logging.getLogger(__name__)

# Ids of COCO's 80 categories, which are numbered up to 90 with gaps. Published models have 91
# classes.
_COCO_IDS = set(range(1, 91)) - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}

# The lists of an annotation file, and the keys of their entries that must be integers if present.
_IDS = {"images": ("id",), "annotations": ("id", "image_id"), "categories": ("id",)}
# COCO's evaluators hold ids in columns of float64; hotcoco refuses negative ids.
_LARGEST_ID = 1 << 53


def read_json(path: Path) -> dict[str, Any]:
    """Read an annotation file: a JSON object with lists of images, annotations and categories.

    Args:
        path: Path of the file.

    Raises:
        DataError: The file is missing or damaged, its top level is not an object, a list is not a
            list of objects, or an id is not an integer.
    """
    try:
        with _without_gc():
            data = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"there is no annotation file {path}") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except RecursionError as error:
        raise DataError(f"{path} is not a COCO annotation file: too deeply nested") from error
    except ValueError as error:
        raise DataError(f"{path} is truncated, damaged or not JSON: {error}") from error
    if not isinstance(data, dict):
        raise DataError(
            f"{path} is not a COCO annotation file: its top level must be a JSON object, "
            f"got {type(data).__name__}"
        )
    for name, keys in _IDS.items():
        if name in data:
            _check_list(path, name, data[name], keys)
    return data


def _check_list(path: Path, name: str, entries: Any, keys: Sequence[str]) -> None:
    """Raise DataError unless `entries` is a list of objects with integers as ids."""
    smallest = -_LARGEST_ID if name == "annotations" else 0
    if not isinstance(entries, list):
        raise DataError(
            f"{path} is not a COCO annotation file: {name} must be a list, "
            f"got {reprlib.repr(entries)}"
        )
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise DataError(
                f"{path} is not a COCO annotation file: {name}[{number}] must be an object, "
                f"got {reprlib.repr(entry)}"
            )
        for key in keys:
            value = entry.get(key, 0)
            # A Boolean is an int for `isinstance`.
            if type(value) is not int or not smallest <= value <= _LARGEST_ID:
                raise DataError(
                    f"{path} is not a COCO annotation file: {name}[{number}].{key} must be an "
                    f"integer from {smallest} to {_LARGEST_ID}, got {reprlib.repr(value)}"
                )


@contextlib.contextmanager
def _without_gc() -> Iterator[None]:
    """Pause the garbage collector, which takes a third of the time to parse a large file."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def category_names_of(data: Mapping[str, Any]) -> dict[int, str]:
    """Return the name of each category id, without the placeholder of Roboflow.

    The first category of Roboflow's exports has the id 0 and the name of the project. It is only
    the supercategory of the others and has no objects.

    Args:
        data: Content of an annotation file.
    """
    names = {int(entry["id"]): str(entry["name"]) for entry in data["categories"]}
    parents = {int(entry["id"]): str(entry.get("supercategory")) for entry in data["categories"]}
    placeholder = parents.get(0) == "none" and names[0] in parents.values()
    if placeholder and not any(entry.get("category_id") == 0 for entry in data["annotations"]):
        report_placeholder(names.pop(0))
    return names


def report_placeholder(name: str) -> None:
    """Log that the category 0 of Roboflow is left out."""
    logger.info("category 0 (%s) is a placeholder without objects: left out", name)


def select_images(data: Mapping[str, Any], only: Collection[str]) -> dict[str, Any]:
    """Return the content of an annotation file with some of its images and their annotations.

    Args:
        data: Content of an annotation file.
        only: File names of the images to keep.
    """
    images = [entry for entry in data["images"] if str(entry["file_name"]) in only]
    dropped = {entry["id"] for entry in data["images"]} - {entry["id"] for entry in images}
    # Annotations of images that the file does not list are kept, to be reported.
    kept = [entry for entry in data["annotations"] if entry["image_id"] not in dropped]
    return {**data, "images": images, "annotations": kept}


def label_map_of(category_names: Mapping[int, str]) -> dict[int, int]:
    """Return the category id of each label.

    For the categories of COCO, label and category id are equal, as in published models: 91 labels,
    of which some are not used. Other categories get labels from 0 without gaps, in the order of
    their ids.

    Args:
        category_names: Name of each category id.
    """
    if set(category_names) == _COCO_IDS:
        return {number: number for number in range(91)}
    return dict(enumerate(sorted(category_names)))


def size_of(entry: Mapping[str, Any]) -> tuple[int, int]:
    """Return width and height of an entry of `images` in pixels; (0, 0) if it has no valid size."""
    size = entry.get("width"), entry.get("height")
    valid = all(isinstance(side, int | float) and 0 < side < 1e9 for side in size)
    return (int(size[0]), int(size[1])) if valid else (0, 0)


def describe(error: Exception) -> str:
    """Describe an exception in words; a `KeyError` alone is only the name of the key."""
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)
