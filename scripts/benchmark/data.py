"""Reading images from a zip against reading them from a folder.

    python -m scripts.benchmark.data --output benchmarks/data.json

The same images, given or made, are written as a folder and as a zip side by side and read in one
shuffled order through the code that training uses. The two take turns in one run, so that a slow
moment of the machine hits both; a speed is the median over the rounds of (time of the folder /
time of the zip in the same round). "cached" reads from the system's file cache, "evicted" after
the system was asked to drop the files from it, "decoded" makes RGB images of cached files.
"""

import argparse
import io
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from datasets.image_sources import ImageSource, open_images
from datasets.images import decode_rgb

FORMS = ("folder", "zip")


def parse_args() -> argparse.Namespace:
    """Flags of the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--images", type=Path, help="folder of JPEG files; by default some are made"
    )
    parser.add_argument("--count", type=int, default=500, help="images to read")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds after a warm-up")
    parser.add_argument(
        "--scratch", type=Path, help="where to write; by default a temporary folder"
    )
    parser.add_argument("--output", type=Path, help="JSON file to write")
    return parser.parse_args()


def made_images(count: int) -> Iterator[tuple[str, bytes]]:
    """JPEG files of COCO's usual size, 640 x 480 and about 150 kB."""
    draw = np.random.default_rng(0)
    for number in range(count):
        soft = Image.fromarray(draw.integers(0, 256, (60, 80, 3), dtype=np.uint8))
        pixels = np.asarray(soft.resize((640, 480), Image.Resampling.BICUBIC)).astype(np.int16)
        pixels += draw.integers(-16, 17, (480, 640, 1), dtype=np.int16)
        buffer = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        yield f"{number:012d}.jpg", buffer.getvalue()


def given_images(folder: Path, count: int) -> Iterator[tuple[str, bytes]]:
    """The first JPEG files of a folder."""
    for path in sorted(folder.glob("*.jpg"))[:count]:
        yield path.name, path.read_bytes()


def write_both(root: Path, images: Iterator[tuple[str, bytes]]) -> tuple[list[str], int]:
    """Writes the images as `root/images` and `root/images.zip`; returns names and bytes."""
    folder, names, size = root / "images", [], 0
    folder.mkdir(parents=True)
    with zipfile.ZipFile(root / "images.zip", "w", zipfile.ZIP_STORED) as archive:
        for name, content in images:
            (folder / name).write_bytes(content)
            archive.writestr(f"images/{name}", content)
            names.append(name)
            size += len(content)
    if not names:
        raise SystemExit("error: there are no JPEG files to read")
    # Only clean pages can be dropped from the cache.
    os.sync()
    return names, size


def evict(path: Path) -> None:
    """Asks the system to drop a file, or the files of a folder, from its cache."""
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def tasks(sources: dict[str, ImageSource], order: list[int]) -> dict[str, dict[str, Callable]]:
    """What is timed, by kind and form; each returns the seconds it took."""

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


def measure(forms: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of both forms in every round, the first of them changing every round."""
    times: dict[str, list[float]] = {form: [] for form in forms}
    for number in range(rounds + 1):
        for form in FORMS if number % 2 else FORMS[::-1]:
            seconds = forms[form]()
            if number:
                times[form].append(seconds)
    return times


def main() -> None:
    """Measure, print a table, write JSON."""
    args = parse_args()
    images = given_images(args.images, args.count) if args.images else made_images(args.count)
    root = Path(tempfile.mkdtemp(prefix="benchmark-data-", dir=args.scratch))
    try:
        names, size = write_both(root, images)
        sources = {
            "folder": open_images(root / "images", names),
            "zip": open_images(root / "images.zip", names),
        }
        order = np.random.default_rng(1).permutation(len(names)).tolist()
        results = {}
        for kind, forms in tasks(sources, order).items():
            times = measure(forms, args.rounds)
            ratios = [f / z for f, z in zip(*(times[form] for form in FORMS), strict=True)]
            results[kind] = {
                "images_per_second": {
                    form: len(names) / statistics.median(times[form]) for form in FORMS
                },
                "zip_speed": statistics.median(ratios),
            }
    finally:
        shutil.rmtree(root)
    report = {
        "machine": {"cpu": cpu_name(), "python": platform.python_version()},
        "images": len(names),
        "mean_kilobytes": size / len(names) / 1000,
        "rounds": args.rounds,
        "results": results,
    }
    print(f"{'images/s':<12} {'folder':>10} {'zip':>10} {'zip speed':>10}")
    for kind, row in results.items():
        folder, archive = (row["images_per_second"][form] for form in FORMS)
        print(f"{kind:<12} {folder:>10.0f} {archive:>10.0f} {row['zip_speed']:>10.2f}")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=2) + "\n")


def cpu_name() -> str:
    """The processor's name, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    found = (line.split(":")[1].strip() for line in lines if "model name" in line)
    return next(found, platform.processor() or platform.machine())


if __name__ == "__main__":
    main()
