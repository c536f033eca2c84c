"""A small annotation file in COCO's format, valid or with changes."""

from typing import Any

CATEGORIES = [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}, {"id": 40, "name": "cow"}]
# Images are 13 x 9 pixels. The third has only a crowd annotation, the fourth has none.
ANNOTATIONS: list[dict[str, Any]] = [
    {"image_id": 5, "category_id": 7, "bbox": [1, 2, 4, 3]},
    {"image_id": 2, "category_id": 40, "bbox": [0, 0, 13, 9]},
    {"image_id": 5, "category_id": 3, "bbox": [6, 1, 3.5, 8]},
    {"image_id": 8, "category_id": 3, "bbox": [0, 0, 5, 5], "iscrowd": 1},
]
FILES = {5: "a.png", 2: "sub/b.png", 8: "c.png", 9: "d.png"}


def square(x: float, y: float, width: float, height: float) -> list[list[float]]:
    """Return a rectangle as a list of one polygon."""
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


def data(**changes: Any) -> dict[str, Any]:
    """Return the content of the file, with changed keys; segmentations fill the boxes."""
    annotations = [
        {"id": 10 + i, "area": 6.5, "iscrowd": 0, "segmentation": square(*entry["bbox"])} | entry
        for i, entry in enumerate(ANNOTATIONS)
    ]
    images = [
        {"id": key, "file_name": name, "height": 9, "width": 13} for key, name in FILES.items()
    ]
    return {"images": images, "annotations": annotations, "categories": CATEGORIES} | changes


def changed(**changes: Any) -> dict[str, Any]:
    """Return the content with a changed first annotation; None removes a key."""
    content = data()
    entry = content["annotations"][0] | changes
    content["annotations"][0] = {key: entry[key] for key in entry if entry[key] is not None}
    return content
