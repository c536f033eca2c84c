"""A clean data set for the detection trainer and one for the classification trainer."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from tests.datasets.coco_files import square

SIZE = (40, 30)


def picture(seed: int, orientation: int = 1, size: tuple[int, int] = SIZE) -> bytes:
    """Return a PNG of noise; equal seeds give equal pixels."""
    pixels = np.random.RandomState(seed).randint(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", exif=exif)
    return buffer.getvalue()


def annotations(first: int, count: int) -> dict[str, Any]:
    """Return annotations of `count` images with one cat and one dog each."""
    images = [
        {"id": i, "file_name": f"{i}.png", "width": SIZE[0], "height": SIZE[1]}
        for i in range(first, first + count)
    ]
    boxes = {1: [2, 3, 10, 8], 2: [20, 10, 20, 20]}
    entries = [
        {
            "id": 10 * image["id"] + category,
            "image_id": image["id"],
            "category_id": category,
            "bbox": box,
            "area": box[2] * box[3],
            "iscrowd": 0,
            "segmentation": square(*box),
        }
        for image in images
        for category, box in boxes.items()
    ]
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    return {"images": images, "annotations": entries, "categories": categories}


class Coco:
    """A data set in COCO's layout, to be changed and then written.

    Attributes:
        root: Folder of the data set.
        train: Content of the annotation file of train: images 0 to 11.
        val: Content of the annotation file of val: images 50 to 53.
        files: Content of the image files by split and name.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.train, self.val = annotations(0, 12), annotations(50, 4)
        self.files = {
            split: {e["file_name"]: picture(e["id"]) for e in getattr(self, split)["images"]}
            for split in ("train", "val")
        }

    def write(self) -> Path:
        """Write the data set with the images in folders."""
        (self.root / "annotations").mkdir(parents=True)
        for split, files in self.files.items():
            path = self.root / "annotations" / f"instances_{split}2017.json"
            path.write_text(json.dumps(getattr(self, split)))
            (self.root / f"{split}2017").mkdir()
            for name, content in files.items():
                (self.root / f"{split}2017" / name).write_bytes(content)
        return self.root


class Folders:
    """Class folders, to be changed and then written.

    Attributes:
        root: Folder of the data set.
        files: Content of the files by name, such as `train/cat/0.png`.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        names = [f"train/{label}/{i}.png" for label in ("cat", "dog", "fox") for i in range(4)]
        names += [f"val/{label}/{i}.png" for label in ("cat", "dog", "fox") for i in range(2)]
        self.files = {name: picture(seed) for seed, name in enumerate(names)}

    def write(self) -> Path:
        """Write the files."""
        for name, content in self.files.items():
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            (self.root / name).write_bytes(content)
        return self.root
