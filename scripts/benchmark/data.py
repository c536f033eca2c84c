"""Time the reading of images, and whole loaders with their transforms.

    python -m scripts.benchmark data --output benchmarks/data.json
    python -m scripts.benchmark data --part imagenet --output benchmarks/data_imagenet.json
    python -m scripts.benchmark data --part coco --output benchmarks/data_coco.json
    python -m scripts.benchmark data --part stages --output benchmarks/data_stages.json

`--part imagenet` and `--part coco` compare the loaders of the trainers with those of timm and
torchvision, see `scripts.benchmark.loaders`. All read the same generated JPEG files of the usual
size of ImageNet (500 x 375) or COCO (640 x 480), and the loaders take turns. A time is the CPU time
of the workers per image, the median over the rounds. A ratio is the median over the rounds of
(time / time of `floats` in the same round), where `floats` are the loaders with transforms to
normalized floats. The last column has the images per second that all workers deliver, which counts
only if the machine has a free core for each worker.

`--part stages` times decoding, resizing and each operation of RandAugment in all versions, see
`scripts.benchmark.stages`.

`--part files`, the default, compares a zip with a folder.
The same images, given or generated, are written to a folder and to a zip, and read in one shuffled
order by the code that training uses. The two forms are read alternately in one process, so that
another load on the machine slows down both. A speed is the median over the rounds of (time of the
folder / time of the zip in the same round).

    cached     read from the file cache of the system
    evicted    read after the system was asked to drop the files from its cache
    decoded    read from the cache and decoded to RGB images
"""

import argparse
import io
import json
import os
import shutil
import statistics
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from datasets.image_sources import ImageSource, open_images
from datasets.images import decode_rgb
from engine.provenance import machine
from scripts.benchmark.loaders import (
    COCO_BATCH,
    IMAGENET_BATCH,
    coco_loaders,
    imagenet_loaders,
    seconds_to_read,
)
from scripts.benchmark.stages import measure_stages
from scripts.benchmark.timing import median_ratio, positive_int

__all__ = ["main"]

FORMS = ("folder", "zip")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.benchmark data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--part",
        choices=("files", "imagenet", "coco", "stages"),
        default="files",
        help="Part to measure (default: %(default)s)",
    )
    parser.add_argument(
        "--images",
        type=Path,
        metavar="FOLDER",
        help="Folder of .jpg files to read, for --part files (default: generated images)",
    )
    parser.add_argument(
        "--count",
        type=positive_int,
        default=500,
        metavar="N",
        help="Number of images to read (default: %(default)s)",
    )
    parser.add_argument(
        "--rounds",
        type=positive_int,
        default=9,
        metavar="N",
        help="Number of timed rounds, after one warm-up round (default: %(default)s)",
    )
    parser.add_argument(
        "--workers",
        type=positive_int,
        default=1,
        metavar="N",
        help="Number of workers of the loaders (default: %(default)s)",
    )
    parser.add_argument(
        "--scratch",
        type=Path,
        metavar="FOLDER",
        help="Folder for temporary files (default: that of the system)",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="JSON file to write (default: none)"
    )
    return parser.parse_args(argv)


def generated_images(
    count: int, width: int = 640, height: int = 480
) -> Iterator[tuple[str, bytes]]:
    """Yield names and contents of JPEG files, by default of COCO's usual size and about 150 kB."""
    random = np.random.default_rng(0)
    for number in range(count):
        shape = (height // 8, width // 8, 3)
        soft = Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8))
        pixels = np.asarray(soft.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
        pixels += random.integers(-16, 17, (height, width, 1), dtype=np.int16)
        buffer = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        yield f"{number:012d}.jpg", buffer.getvalue()


def given_images(folder: Path, count: int) -> Iterator[tuple[str, bytes]]:
    """Yield names and contents of the first JPEG files of a folder."""
    for path in sorted(folder.glob("*.jpg"))[:count]:
        yield path.name, path.read_bytes()


def write_both(root: Path, images: Iterator[tuple[str, bytes]]) -> tuple[list[str], int]:
    """Write `root/images` and `root/images.zip`; return the names and the number of bytes."""
    folder, names, size = root / "images", [], 0
    folder.mkdir(parents=True)
    with zipfile.ZipFile(root / "images.zip", "w", zipfile.ZIP_STORED) as archive:
        for name, content in images:
            (folder / name).write_bytes(content)
            archive.writestr(f"images/{name}", content)
            names.append(name)
            size += len(content)
    if not names:
        raise SystemExit("error: --images must be a folder with .jpg files, found none")
    # The system drops a page from its cache only after it is written to the disk.
    os.sync()
    return names, size


def evict(path: Path) -> None:
    """Ask the system to drop a file, or the files of a folder, from its cache."""
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def tasks(sources: dict[str, ImageSource], order: list[int]) -> dict[str, dict[str, Callable]]:
    """Return the timed functions by kind and form. Each returns its time in seconds."""

    def timed(source: ImageSource, cold: bool, decoded: bool) -> Callable[[], float]:
        def run() -> float:
            if cold:
                evict(source.path)
            start = time.perf_counter()
            for index in order:
                content = source.read(index)
                if decoded:
                    decode_rgb(content, "an image")
            return time.perf_counter() - start

        return run

    kinds = {"cached": (False, False), "evicted": (True, False), "decoded": (False, True)}
    return {
        kind: {form: timed(source, *options) for form, source in sources.items()}
        for kind, options in kinds.items()
    }


def measure_forms(forms: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of both forms in every round. The form that is read first alternates."""
    times: dict[str, list[float]] = {form: [] for form in forms}
    for number in range(rounds + 1):
        for form in FORMS if number % 2 else FORMS[::-1]:
            seconds = forms[form]()
            if number:
                times[form].append(seconds)
    return times


def measure_files(args: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Measure the reading from a folder and a zip, and print a table."""
    images = given_images(args.images, args.count) if args.images else generated_images(args.count)
    names, size = write_both(root, images)
    sources = {
        "folder": open_images(root / "images", names),
        "zip": open_images(root / "images.zip", names),
    }
    order = np.random.default_rng(1).permutation(len(names)).tolist()
    results = {}
    for kind, forms in tasks(sources, order).items():
        times = measure_forms(forms, args.rounds)
        results[kind] = {
            "images_per_second": {
                form: len(names) / statistics.median(times[form]) for form in FORMS
            },
            "zip_speed": median_ratio(times["folder"], times["zip"]),
        }
    print(f"{'images/s':<12} {'folder':>10} {'zip':>10} {'zip speed':>10}")
    for kind, row in results.items():
        folder, archive = (row["images_per_second"][form] for form in FORMS)
        print(f"{kind:<12} {folder:>10.0f} {archive:>10.0f} {row['zip_speed']:>10.2f}")
    kilobytes = size / len(names) / 1000
    return {"images": len(names), "mean_kilobytes": kilobytes, "results": results}


def measure_loaders(args: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Measure the loaders of one recipe, and print a table."""
    if args.part == "imagenet":
        batch = IMAGENET_BATCH
        count = -(-args.count // batch) * batch
        loaders = imagenet_loaders(root, generated_images(count, 500, 375), args.workers)
    else:
        batch = COCO_BATCH
        count = -(-args.count // batch) * batch
        loaders = coco_loaders(root, generated_images(count), args.workers)
    cpu: dict[str, list[float]] = {name: [] for name in loaders}
    wall: dict[str, list[float]] = {name: [] for name in loaders}
    for number in range(args.rounds + 1):
        for name in list(loaders)[:: 1 if number % 2 else -1]:
            seconds, passed = seconds_to_read(loaders[name]())
            if number:
                cpu[name].append(seconds)
                wall[name].append(passed)
    results = {
        name: {
            "cpu_ms_per_image": statistics.median(cpu[name]) / count * 1000,
            "images_per_second_per_core": count / statistics.median(cpu[name]),
            "wall_ms_per_image": statistics.median(wall[name]) / count * 1000,
            "ratio_to_floats": median_ratio(cpu[name], cpu["floats"]),
        }
        for name in loaders
    }
    columns = ("ms/image", "per core", "ratio", "images/s")
    print(f"{args.part:<12} " + " ".join(f"{column:>10}" for column in columns))
    for name, row in results.items():
        ms, speed, wall_ms, ratio = row.values()
        print(f"{name:<12} {ms:>10.2f} {speed:>10.0f} {ratio:>10.2f} {1000 / wall_ms:>10.0f}")
    return {"images": count, "batch_size": batch, "workers": args.workers, "results": results}


def measure_parts(args: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Measure the stages of an image, and print a table."""
    results = measure_stages(generated_images(args.count, 500, 375), args.rounds)
    print(f"{'stage':<16} ms per image")
    for stage, versions in results.items():
        print(f"{stage:<16} " + "  ".join(f"{name} {ms:.2f}" for name, ms in versions.items()))
    return {"images": args.count, "results": results}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table and write JSON."""
    args = parse_args(argv)
    root = Path(tempfile.mkdtemp(prefix="benchmark-data-", dir=args.scratch))
    measure = {"files": measure_files, "stages": measure_parts}.get(args.part, measure_loaders)
    try:
        measured = measure(args, root)
    finally:
        shutil.rmtree(root)
    report = {"machine": machine(), "rounds": args.rounds, **measured}
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=2) + "\n")
