"""Convert the annotations of another format to COCO's; the images stay where they are.

python -m datasets.convert yolo DATA.yaml [--output_dir DIR] [--force]
"""

import argparse
import json
import sys
from pathlib import Path

from datasets.errors import DataError
from datasets.stored_files import write_atomically
from datasets.yolo import convert_split, read_yolo

__all__ = ["convert_yolo", "main", "parse_args"]


def convert_yolo(path: Path, output_dir: Path | None = None, *, force: bool = False) -> list[str]:
    """Write `annotations/instances_<split>.json` for each split of a YOLO data set.

    Args:
        path: YAML file of the data set, or its folder.
        output_dir: Folder to write to; by default that of the data set.
        force: Overwrite existing files.

    Returns:
        The images that cannot be read and are left out.

    Raises:
        DataError: The data is missing or damaged, or a file exists or cannot be written.
    """
    data = read_yolo(path)
    root = data.root if output_dir is None else output_dir
    files = {split: root / "annotations" / f"instances_{split}.json" for split in data.places}
    for file in files.values():
        if file.exists() and not force:
            raise DataError(f"{file} exists: --force overwrites it")
    converted = {split: convert_split(data, split, root) for split in files}
    for split, (content, _) in converted.items():
        try:
            with write_atomically(files[split]) as file:
                file.write(json.dumps(content).encode())
        except OSError as error:
            raise DataError(f"cannot write {files[split]}: {error.strerror}") from error
        print(
            f"{files[split]}: {len(content['images'])} images, "
            f"{len(content['annotations'])} objects, {len(content['categories'])} classes"
        )
    return [name for _, unreadable in converted.values() for name in unreadable]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line.

    Args:
        argv: Words; None for those of the process.
    """
    parser = argparse.ArgumentParser(
        prog="python -m datasets.convert",
        description="Convert annotations to COCO's format.",
        allow_abbrev=False,
    )
    formats = parser.add_subparsers(dest="format", required=True)
    yolo = formats.add_parser("yolo", help="a data set of Ultralytics YOLO")
    yolo.add_argument("data", type=Path, help="YAML file of the data set, or its folder")
    yolo.add_argument(
        "--output_dir", "--output-dir", type=Path, help="default: the folder of the data set"
    )
    yolo.add_argument("--force", action="store_true", help="overwrite existing files")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Convert the data set given on the command line.

    Args:
        argv: Words; None for those of the process.

    Returns:
        The exit code: 1 if an image could not be read, else 0.
    """
    args = parse_args(argv)
    try:
        unreadable = convert_yolo(args.data, args.output_dir, force=args.force)
    except DataError as error:
        sys.exit(f"error: {error}")
    for name in unreadable:
        print(f"left out: {name}", file=sys.stderr)
    return int(bool(unreadable))


if __name__ == "__main__":
    sys.exit(main())
