"""Time the start of a detection training and COCO's metrics at the size of COCO.

    OMP_NUM_THREADS=1 python -m scripts.benchmark coco --output benchmarks/coco.json

The data set is generated: annotations with polygons, and images that are hard links to a few files.

    start         opening the data set and reading the first batch of two images, in a new process;
                  the first start parses the annotations and stores them, the second maps them
    evaluation    the twelve metrics of COCO by each library, for the same detections

The times are CPU seconds, because other programs may run on the machine. The memory is the peak of
the resident memory of the process, which includes shared libraries and mapped files.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from engine.provenance import machine
from scripts.benchmark.timing import positive_int

__all__ = ["main", "measure_evaluation", "measure_starts", "write_coco"]

WIDTH, HEIGHT = 640, 480
CATEGORIES = [{"id": i, "name": f"class {i}", "supercategory": "thing"} for i in range(1, 81)]
# Different objects and image files, which are used many times.
SHAPES, FILES = 20_000, 16


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.benchmark coco",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options = {
        "images": (118_000, "Number of training images"),
        "objects": (860_000, "Number of training objects"),
        "eval-images": (5_000, "Number of images to evaluate"),
        "detections": (100, "Number of detections per image"),
    }
    for name, (number, text) in options.items():
        parser.add_argument(
            f"--{name}",
            type=positive_int,
            default=number,
            metavar="N",
            help=f"{text} (default: %(default)s)",
        )
    parser.add_argument(
        "--scratch",
        type=Path,
        metavar="FOLDER",
        help="Folder for temporary files, 1 GB (default: that of the system)",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="JSON file to write (default: none)"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the measured times and memory, and write them to the JSON file."""
    args = parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        root = Path(scratch) / "coco"
        write_coco(root, "train", args.images, args.objects)
        starts = measure_starts(root)
        write_coco(root, "val", args.eval_images, args.eval_images * 7)
        evaluation = measure_evaluation(root, args.detections)
    for kind, rows in starts.items():
        for name, row in rows.items():
            print(
                f"{name} start, {kind:5}  {row['seconds']:6.1f} s   "
                f"peak {row['peak_mb']:5.0f} MB, imports alone {row['imports_mb']:5.0f} MB"
            )
    for kind, row in evaluation.items():
        times = ", ".join(f"{name} {s:.2f} s" for name, s in row["seconds"].items())
        print(f"{kind}  {times}   largest difference {row['largest_difference']}")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        sizes = {k: vars(args)[k] for k in ("images", "objects", "eval_images", "detections")}
        report = {"machine": machine(), **sizes, "starts": starts, "evaluation": evaluation}
        args.output.write_text(json.dumps(report, indent=1) + "\n")


def write_coco(root: Path, split: str, images: int, objects: int) -> None:
    """Write annotations and images in COCO's layout.

    Args:
        root: Folder of the data set.
        split: `train` or `val`.
        images: Number of images.
        objects: Number of objects.
    """
    random = np.random.default_rng(0)
    shapes = [_shape(random) for _ in range(min(SHAPES, objects))]
    chosen = random.integers(0, len(shapes), objects)
    owners = np.sort(random.integers(0, images, objects))
    folder = root / f"{split}2017"
    folder.mkdir(parents=True)
    for number in range(images):
        path, first = (folder / f"{n:012d}.jpg" for n in (number, number % FILES))
        if number < FILES:
            pixels = random.integers(0, 256, (12, 16, 3), dtype=np.uint8)
            soft = Image.fromarray(pixels).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
            soft.save(path)
        else:
            path.hardlink_to(first)
    listed = (
        {"id": n, "file_name": f"{n:012d}.jpg", "width": WIDTH, "height": HEIGHT}
        for n in range(images)
    )
    (root / "annotations").mkdir(exist_ok=True)
    with (root / "annotations" / f"instances_{split}2017.json").open("w") as file:
        file.write('{"images": [' + ", ".join(map(json.dumps, listed)))
        file.write(f'], "categories": {json.dumps(CATEGORIES)}, "annotations": [')
        for number, (owner, shape) in enumerate(zip(owners.tolist(), chosen.tolist(), strict=True)):
            comma = ", " if number else ""
            file.write(f'{comma}{{"id": {number + 1}, "image_id": {owner}, {shapes[shape]}}}')
        file.write("]}")


def _shape(random: np.random.Generator) -> str:
    """Return an object as a part of JSON: a polygon of 8 to 40 corners, or rarely a crowd."""
    corners = int(random.integers(8, 40))
    angles = np.arange(corners) * (2 * np.pi / corners)
    radii = np.exp(random.uniform(np.log(6), np.log(150), (2, 1))) * random.uniform(0.8, 1, corners)
    x, y = random.uniform(0, (WIDTH, HEIGHT))[:, None] + radii * (np.cos(angles), np.sin(angles))
    x, y = x.clip(0, WIDTH).round(2), y.clip(0, HEIGHT).round(2)
    segmentation: Any = [np.stack([x, y], axis=1).ravel().tolist()]
    crowd = random.random() < 0.01
    if crowd:
        columns = [int(x.min()), max(int(np.ptp(x)), 1)]
        counts = [HEIGHT * n for n in (*columns, WIDTH - sum(columns))]
        segmentation = {"counts": counts, "size": [HEIGHT, WIDTH]}
    box = [x.min(), y.min(), np.ptp(x), np.ptp(y)]
    content = {
        "segmentation": segmentation,
        "area": round(abs(float(x @ np.roll(y, 1) - y @ np.roll(x, 1))) / 2, 4),
        "iscrowd": int(crowd),
        "bbox": [round(float(side), 2) for side in box],
        "category_id": int(random.integers(1, 81)),
    }
    return json.dumps(content)[1:-1]


def measure_starts(root: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Return time and memory of the first and the second start, with and without masks."""
    context = multiprocessing.get_context("spawn")
    results: dict[str, dict[str, dict[str, float]]] = {}
    for kind in ("boxes", "masks"):
        for name in ("first", "second"):
            with context.Pool(1) as pool:
                row = pool.apply(_start, (root, kind == "masks"))
            results.setdefault(kind, {})[name] = row
    return results


def _start(root: Path, with_masks: bool) -> dict[str, float]:
    """Open the data set and read a batch, in a process of its own."""
    from torch.utils.data import DataLoader

    from datasets import (
        DistributedShuffleSampler,
        ResilientDataset,
        SeededDataset,
        build_coco,
        build_coco_transforms,
        collate,
    )

    transforms = build_coco_transforms("train")
    imports = _peak_mb()
    start = time.process_time()
    dataset = build_coco("train", root, transforms=transforms, with_masks=with_masks)
    opened = time.process_time() - start
    loader = DataLoader(
        SeededDataset(ResilientDataset(dataset)),
        sampler=DistributedShuffleSampler(len(dataset)),
        batch_size=2,
        collate_fn=collate,
    )
    next(iter(loader))
    seconds = time.process_time() - start
    return {
        "seconds": round(seconds, 2),
        "opening_seconds": round(opened, 2),
        "peak_mb": _peak_mb(),
        "imports_mb": imports,
    }


def _peak_mb() -> float:
    """Return the peak of the resident memory of this process in MB, on Linux."""
    # The peak of `resource` may include that of the parent process.
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(line for line in lines if line.startswith("VmHWM"))
    return round(int(peak.split()[1]) * 1024 / 1e6)


def measure_evaluation(root: Path, per_image: int) -> dict[str, dict[str, Any]]:
    """Return the time of each library, and the largest difference of the twelve metrics."""
    from datasets import build_coco
    from detection.coco_scoring import create_scorer
    from engine.optional import is_installed

    truth = build_coco("val", root).coco
    detections = _detections(truth.dataset, per_image)
    libraries = ["pycocotools", *(["hotcoco"] if is_installed("hotcoco") else [])]
    results: dict[str, dict[str, Any]] = {}
    for kind in ("bbox", "segm"):
        seconds, indexing, metrics = {}, {}, []
        for library in libraries:
            with _timed(indexing, library):
                scorer = create_scorer(truth, (kind,), library)
            with _timed(seconds, library):
                metrics.append(scorer.score(detections, kind).metrics)
        results[kind] = {
            "versions": {library: version(library) for library in libraries},
            "seconds": seconds,
            "indexing_seconds": indexing,
            "largest_difference": float(np.ptp(metrics, axis=0).max()),
            "metrics": [round(value, 6) for value in metrics[0]],
        }
    return results


@contextmanager
def _timed(times: dict[str, float], name: str) -> Iterator[None]:
    """Store the CPU time of a block in seconds."""
    start = time.process_time()
    yield
    times[name] = round(time.process_time() - start, 3)


def _detections(truth: dict[str, Any], per_image: int) -> Any:
    """Return detections, of which a part is near the objects, with elliptic masks."""
    from pycocotools import mask as coco_masks

    from detection.coco_detections import CocoDetections, EncodedMasks

    random = np.random.default_rng(1)
    images = np.array(sorted(image["id"] for image in truth["images"]), dtype=np.int64)
    owners = np.repeat(images, per_image)
    boxes = np.exp(random.uniform(2, 5.5, (len(owners), 4)))
    boxes[:, :2] = random.uniform(0, (WIDTH - 40, HEIGHT - 40), (len(owners), 2))
    categories = random.integers(1, 81, len(owners))
    objects = truth["annotations"]
    starts = np.searchsorted([entry["image_id"] for entry in objects], images)
    for index, (first, last) in enumerate(zip(starts, [*starts[1:], len(objects)], strict=True)):
        near = np.flatnonzero(random.random(per_image) < 0.4) if last > first else []
        for row in index * per_image + np.asarray(near, dtype=np.int64):
            entry = objects[random.integers(first, last)]
            boxes[row] = entry["bbox"] + random.normal(0, 0.08, 4) * np.tile(entry["bbox"][2:], 2)
            categories[row] = entry["category_id"]
    boxes[:, 2:] = boxes[:, 2:].clip(1)
    angles = np.arange(20) * (2 * np.pi / 20)
    circle = np.stack([1 + np.cos(angles), 1 + np.sin(angles)], axis=1) / 2
    corners = boxes[:, None, :2] + boxes[:, None, 2:] * circle
    rles = coco_masks.frPyObjects(corners.reshape(len(boxes), -1).tolist(), HEIGHT, WIDTH)
    return CocoDetections(
        image_ids=images,
        counts=np.full(len(images), per_image, dtype=np.int64),
        categories=categories,
        # Some scores are equal.
        scores=random.random(len(owners)).round(5),
        boxes=boxes,
        masks=EncodedMasks.of_rle(rles),
    )


if __name__ == "__main__":
    main()
