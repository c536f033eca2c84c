"""The command `python -m datasets.check`."""

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn, get_args

from datasets.check.findings import Report
from datasets.check.page import format_page
from datasets.check.text import format_text
from datasets.names import DataSetName, InatCategory
from datasets.saved_split import SplitOptions

__all__ = ["main", "parse_args"]

_OWN_FILES = ("train_images", "train_annotations", "val_images", "val_annotations")


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as those of the trainers."""

    def error(self, message: str) -> NoReturn:
        """Print the error and exit with the code 2."""
        self.exit(2, f"error: {message}\n")


def main(argv: list[str] | None = None) -> int:
    """Check a data set, print the report and write it as HTML if asked.

    Args:
        argv: Flags; None for those of the process.

    Returns:
        The exit code: 1 if there is an error or a warning, else 0.
    """
    args = parse_args(argv)
    report = _check(args)
    sys.stdout.reconfigure(errors="backslashreplace")
    print(format_text(report))
    if args.html is not None:
        try:
            args.html.parent.mkdir(parents=True, exist_ok=True)
            args.html.write_text(format_page(report), encoding="utf-8")
        except OSError as error:
            sys.exit(f"error: cannot write {args.html}: {error.strerror}")
        print(f"Written: {args.html}")
    return report.exit_code


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the flags; an error ends the program with one line and the exit code 2.

    Args:
        argv: Flags; None for those of the process.
    """
    parser = _Parser(
        prog="python -m datasets.check",
        description="Find the problems of a data set before training.",
        allow_abbrev=False,
    )
    detection = parser.add_argument_group("detection")
    detection.add_argument("--coco-path", help="folder of the data, as for detection.main")
    for name in _OWN_FILES:
        split, _, content = name.partition("_")
        kind = "folder or .zip file" if content == "images" else "JSON file"
        detection.add_argument(f"--{split}-{content}", help=f"{kind} of the {split} {content}")
    detection.add_argument("--masks", action="store_true", help="check the segmentations, too")
    folders = parser.add_argument_group("classification")
    folders.add_argument("--data-path", help="folder of the data, as for classification.main")
    names = [name for name in get_args(DataSetName) if name != "CIFAR"]
    folders.add_argument("--data-set", choices=names, default="IMNET", help="default: IMNET")
    folders.add_argument(
        "--inat-category", choices=get_args(InatCategory), default="name", help="default: name"
    )
    folders.add_argument("--load-tar", action="store_true", help="read train.tar and val.tar")
    both = parser.add_argument_group("split")
    both.add_argument(
        "--train-val-split",
        type=float,
        metavar="FRACTION",
        help="fraction of the training images to use for validation, as in the trainers",
    )
    both.add_argument(
        "--split-seed", type=int, default=0, help="random seed of --train-val-split (default: 0)"
    )
    work = parser.add_argument_group("check")
    work.add_argument("--images", action="store_true", help="decode every image")
    cores = len(os.sched_getaffinity(0))
    work.add_argument(
        "--num-workers",
        type=int,
        default=cores,
        help=f"number of processes that decode (default: one per core, {cores})",
    )
    work.add_argument("--html", type=Path, metavar="FILE", help="write the report as HTML, too")
    work.add_argument("--force", action="store_true", help="overwrite the file of --html")
    args = parser.parse_args(_with_dashes(sys.argv[1:] if argv is None else argv))
    _check_flags(parser, args)
    return args


def _with_dashes(argv: list[str]) -> list[str]:
    """Replace `_` by `-` in flags, as the trainers do."""
    words = []
    for word in argv:
        head, equals, tail = word.partition("=")
        words.append(head.replace("_", "-") + equals + tail if head.startswith("--") else word)
    return words


def _check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End the program with one line if flags contradict each other."""
    own = [name for name in _OWN_FILES if getattr(args, name)]
    given = [name for name in ("coco_path", "data_path") if getattr(args, name)]
    if len(given) + bool(own) != 1:
        parser.error(
            "exactly one data set must be given: --coco_path, --data-path, or --train_images, "
            "--train_annotations, --val_images and --val_annotations"
        )
    for split in ("train", "val"):
        pair = [f"{split}_images", f"{split}_annotations"]
        if len(set(pair) & set(own)) == 1:
            parser.error(f"--{pair[0]} and --{pair[1]} must be given together")
    if args.train_val_split is not None and not 0 < args.train_val_split < 1:
        parser.error(f"--train_val_split must be between 0 and 1, got {args.train_val_split}")
    if args.train_val_split is not None and {"val_images", "val_annotations"} & set(own):
        parser.error("--train_val_split must not be given with --val_images")
    if args.num_workers < 0:
        parser.error(f"--num_workers must be at least 0, got {args.num_workers}")
    if args.html is not None and args.html.exists() and not args.force:
        parser.error(f"{args.html} exists: --force overwrites it")


def _check(args: argparse.Namespace) -> Report:
    """Check the data set that the flags name."""
    # Importing torch takes seconds, so `--help` and mistakes in flags come before.
    from datasets.check.coco import check_coco
    from datasets.check.folders import check_folders

    options = None
    if args.train_val_split is not None:
        options = SplitOptions(args.train_val_split, args.split_seed)
    work = {
        "read_images": args.images,
        "num_workers": args.num_workers,
        "train_val_split": options,
    }
    if args.data_path:
        return check_folders(
            args.data_path,
            data_set=args.data_set,
            load_tar=args.load_tar,
            inat_category=args.inat_category,
            **work,
        )
    own = None
    if not args.coco_path:
        splits = {
            split: (getattr(args, f"{split}_images"), getattr(args, f"{split}_annotations"))
            for split in ("train", "val")
        }
        own = {split: pair for split, pair in splits.items() if pair[0]}
        if options is not None:
            own["val"] = splits["train"]
    return check_coco(args.coco_path, own_files=own, with_masks=args.masks, **work)
