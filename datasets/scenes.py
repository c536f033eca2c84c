"""Scenes of handwritten digits: a small detection data set in COCO's format, without a download.

A scene has one to four of scikit-learn's digits on a dark, noisy canvas of 96 x 96 pixels. The
digits are resized to 18 to 36 pixels, have bright colors and do not touch. Boxes are tight around
the pixels with more than a quarter of full ink. Training and validation scenes use different digit
images, by the split of `datasets.embedded`, which mixes the writers.

    python -m datasets.scenes ROOT [--train N] [--val N] [--folders]
"""

import argparse
import io
import json
import os
import sys
import zipfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from datasets.embedded import split_digits
from datasets.errors import DataError
from datasets.scene_drawing import DIGIT_SIDES, Scene, draw_scene
from datasets.write_once import write_once

__all__ = ["SceneOptions", "write_scenes", "main"]

_NOTE_NAME = "scenes.txt"
# A fixed date makes the zips identical on every machine.
_ZIP_DATE = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class SceneOptions:
    """Options of `write_scenes`.

    Attributes:
        train: Number of training scenes, at least 1.
        val: Number of validation scenes, at least 1.
        size: Side of the canvas in pixels, at least 36.
        seed: Seed of all random choices, at least 0.
        folders: Write the images to the folders `train2017` and `val2017` instead of zips.

    Raises:
        ValueError: An option is out of range.
    """

    train: int = 8000
    val: int = 200
    size: int = 96
    seed: int = 0
    folders: bool = False

    def __post_init__(self) -> None:
        if min(self.train, self.val) < 1:
            raise ValueError(f"train and val must be at least 1, got {self.train} and {self.val}")
        if self.size < DIGIT_SIDES[1]:
            raise ValueError(f"size must be at least {DIGIT_SIDES[1]}, got {self.size}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")


def write_scenes(root: str | os.PathLike[str], options: SceneOptions | None = None) -> Path:
    """Write scenes with the files and names of COCO.

    The files are `annotations/instances_{train,val}2017.json` and `{train,val}2017.zip`
    (uncompressed), with members such as `train2017/000000000001.jpg`. The folder appears complete
    or not at all, and several processes may call this at the same time. If the folder already has
    these scenes, nothing is written.

    Args:
        root: A new or empty folder, or one with these scenes.
        options: Options of the scenes; by default 8,000 for training and 200 for validation.

    Returns:
        The absolute path of the folder.

    Raises:
        DataError: The folder has other content or cannot be written.
    """
    options = options or SceneOptions()
    note = f"Scenes of scikit-learn's digits in COCO's format.\n{json.dumps(asdict(options))}\n"
    return write_once(
        Path(root), "scenes", (_NOTE_NAME, note), partial(_write_splits, options=options)
    )


def _write_splits(tree: Path, options: SceneOptions) -> None:
    """Write images and annotations of both splits to the folder `tree`."""
    (tree / "annotations").mkdir()
    first = 1
    for number, (split, glyphs) in enumerate(split_digits().items()):
        count = {"train": options.train, "val": options.val}[split]
        name = f"{split}2017"
        scenes = {
            first + i: draw_scene(
                glyphs, options.size, np.random.default_rng((options.seed, number, i))
            )
            for i in range(count)
        }
        files = {f"{key:012d}.jpg": _jpeg(scene.pixels) for key, scene in scenes.items()}
        if options.folders:
            (tree / name).mkdir()
            for file, content in files.items():
                (tree / name / file).write_bytes(content)
        else:
            _write_zip(tree / f"{name}.zip", {f"{name}/{file}": files[file] for file in files})
        text = json.dumps(_annotations(scenes, options.size))
        (tree / "annotations" / f"instances_{name}.json").write_text(text)
        first += count


def _annotations(scenes: dict[int, Scene], size: int) -> dict[str, Any]:
    """Build the content of an annotation file from the scenes by image id."""
    images = [
        {"id": key, "file_name": f"{key:012d}.jpg", "width": size, "height": size} for key in scenes
    ]
    annotations = []
    for key, scene in scenes.items():
        for box, digit, mask in zip(scene.boxes, scene.digits, scene.masks, strict=True):
            rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": key,
                    # COCO's category ids begin at 1.
                    "category_id": digit + 1,
                    "bbox": box,
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                    "segmentation": {"size": [size, size], "counts": rle["counts"].decode()},
                }
            )
    categories = [{"id": digit + 1, "name": str(digit)} for digit in range(10)]
    info = {"description": "Scenes of scikit-learn's digits"}
    return {
        "info": info,
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }


def _jpeg(pixels: np.ndarray) -> bytes:
    """Encode RGB pixels (size, size, 3) as a JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=92)
    return buffer.getvalue()


def _write_zip(path: Path, files: dict[str, bytes]) -> None:
    """Write {name: content} as an uncompressed zip, sorted by name."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(files):
            archive.writestr(zipfile.ZipInfo(name, _ZIP_DATE), files[name])


def main(argv: list[str] | None = None) -> None:
    """Write scenes to the folder given on the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m datasets.scenes", description="Write scenes of digits in COCO's format."
    )
    parser.add_argument("root", help="new or empty folder to write to")
    for split in ("train", "val"):
        count = getattr(SceneOptions, split)
        parser.add_argument(
            f"--{split}", type=int, default=count, help=f"number of scenes, default {count}"
        )
    parser.add_argument(
        "--folders", action="store_true", help="write images to folders instead of zips"
    )
    args = parser.parse_args(argv)
    try:
        options = SceneOptions(train=args.train, val=args.val, folders=args.folders)
        print(write_scenes(args.root, options))
    except (ValueError, DataError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
