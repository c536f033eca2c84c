"""Scenes of handwritten digits to detect, in COCO's format: real glyphs, no download.

One to four of scikit-learn's digits, 18 to 36 pixels a side and brightly colored, lie apart on a
dark, noisy 96 x 96 canvas. Boxes are tight around the ink that covers more than a quarter of a
pixel. Training and validation scenes are made of different glyphs, by the split of
`datasets.embedded`; writers are mixed.

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
from datasets.trees import write_once

_NOTE_NAME = "scenes.txt"
# Dates are the same everywhere, so that archives are.
_ZIP_DATE = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class SceneOptions:
    """What scenes to write.

    Attributes:
        train: Number of training scenes.
        val: Number of validation scenes.
        size: Side of the canvas, pixels.
        seed: Other seeds give other scenes.
        folders: Images in the folders `train2017` and `val2017` in place of zips.
    """

    train: int = 8000
    val: int = 200
    size: int = 96
    seed: int = 0
    folders: bool = False

    def __post_init__(self) -> None:
        if min(self.train, self.val) < 1:
            raise ValueError(f"train and val must be at least 1, not {self.train}, {self.val}")
        if self.size < DIGIT_SIDES[1]:
            raise ValueError(f"size must be at least {DIGIT_SIDES[1]}, not {self.size}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, not {self.seed}")


def write_scenes(root: str | os.PathLike[str], options: SceneOptions | None = None) -> Path:
    """Writes scenes as COCO has its images.

    That is `annotations/instances_{train,val}2017.json` and `{train,val}2017.zip` (stored), whose
    members are `train2017/000000000001.jpg` and so on. The folder appears whole or not at all, and
    several processes may call this at once. Where the scenes are already, nothing is written.

    Args:
        root: A new or empty folder, or one that holds these scenes.
        options: What scenes; by default 8,000 to train and 200 to validate.

    Returns:
        The folder.

    Raises:
        DataError: The folder holds something else or cannot be written.
    """
    options = options or SceneOptions()
    note = f"Scenes of scikit-learn's digits in COCO's format.\n{json.dumps(asdict(options))}\n"
    return write_once(
        Path(root), "scenes", (_NOTE_NAME, note), partial(_write_splits, options=options)
    )


def _write_splits(tree: Path, options: SceneOptions) -> None:
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
    """Describes scenes, by image id, in COCO's format."""
    images = [
        {"id": key, "file_name": f"{key:012d}.jpg", "width": size, "height": size} for key in scenes
    ]
    annotations = []
    for key, scene in scenes.items():
        for box, digit, mask in zip(scene.boxes, scene.digits, scene.masks, strict=True):
            runs = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": key,
                    # COCO's numbers begin at 1.
                    "category_id": digit + 1,
                    "bbox": box,
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                    "segmentation": {"size": [size, size], "counts": runs["counts"].decode()},
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
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=92)
    return buffer.getvalue()


def _write_zip(path: Path, files: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(files):
            archive.writestr(zipfile.ZipInfo(name, _ZIP_DATE), files[name])


def main(argv: list[str] | None = None) -> None:
    """Writes the scenes to the folder named on the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m datasets.scenes", description="Write scenes of digits in COCO's format."
    )
    parser.add_argument("root", help="a new or empty folder")
    for split in ("train", "val"):
        count = getattr(SceneOptions, split)
        parser.add_argument(f"--{split}", type=int, default=count, help=f"scenes, default {count}")
    parser.add_argument("--folders", action="store_true", help="images in folders, not in zips")
    args = parser.parse_args(argv)
    try:
        options = SceneOptions(train=args.train, val=args.val, folders=args.folders)
        print(write_scenes(args.root, options))
    except (ValueError, DataError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
