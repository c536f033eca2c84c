"""The check of a data set for the detection trainer."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from datasets.check.across import find_copies
from datasets.check.annotations import Examined, examine
from datasets.check.boxes import find_bad_boxes
from datasets.check.classes import find_bad_classes
from datasets.check.findings import Finding, Report, Summary
from datasets.check.pixels import Picture, find_bad_pictures, find_wrong_sizes, read_pictures
from datasets.coco import CocoImages
from datasets.coco_layouts import CocoFiles, find_coco
from datasets.errors import DataError
from datasets.image_sources import open_images
from datasets.saved_split import SplitOptions

__all__ = ["check_coco"]


@dataclass(frozen=True)
class _Split:
    """One split: its files, its annotations and, if they were read, its images."""

    files: CocoFiles
    examined: Examined
    pictures: list[Picture] | None


def check_coco(
    coco_path: str | os.PathLike[str] | None = None,
    *,
    own_files: Mapping[str, tuple[str | None, str | None]] | None = None,
    with_masks: bool = False,
    read_images: bool = False,
    num_workers: int = 0,
    train_val_split: SplitOptions | None = None,
) -> Report:
    """Check a data set in COCO's format.

    Args:
        coco_path: Folder of the data set, as for `build_coco`.
        own_files: Images and annotations of each split, instead of those in `coco_path`.
        with_masks: Check the segmentations, too.
        read_images: Decode all images.
        num_workers: Number of processes that decode.
        train_val_split: Use a part of the training images for validation, as for `build_coco`.
    """
    own_files = own_files or {"train": (None, None), "val": (None, None)}
    report = Report(str(coco_path or next(iter(own_files.values()))[1]))
    splits: dict[str, _Split] = {}
    for name, (images, annotations) in own_files.items():
        try:
            files = find_coco(
                name,
                coco_path,
                images=images,
                annotations=annotations,
                train_val_split=train_val_split,
            )
            splits[name] = _check_split(name, files, report, with_masks, read_images, num_workers)
        except DataError as error:
            report.findings.append(_unopened(name, error))
    if len(splits) == 2:
        report.findings += _compare(splits["train"], splits["val"])
    read = {name: split.pictures for name, split in splits.items() if split.pictures is not None}
    report.findings += find_copies(read)
    if not report.of("error"):
        # The trainers may refuse what was not looked for here.
        report.findings += _open_as_trainer(splits, with_masks)
    return report


def _unopened(split: str, error: DataError) -> Finding:
    """Return the finding of a split that cannot be opened."""
    return Finding("error", "cannot be opened", split, 1, f"{error}.")


def _check_split(
    name: str,
    files: CocoFiles,
    report: Report,
    with_masks: bool,
    read_images: bool,
    num_workers: int,
) -> _Split:
    """Check one split by itself, and add its summary and findings to the report."""
    examined = examine(files.annotations, name, with_masks=with_masks, only=files.only)
    source = open_images(files.images, examined.file_names, allow_missing=True)
    report.findings += examined.findings
    if source.missing:
        report.findings.append(
            Finding(
                "error",
                "missing images",
                name,
                len(source.missing),
                f"The annotations name them, but {files.images} lacks them: training stops.",
                [examined.file_names[index] for index in source.missing],
            )
        )
    sizes, pictures = examined.sizes, None
    if read_images:
        title = f"decode {name}"
        pictures = read_pictures(
            source, examined.file_names, sizes, title=title, num_workers=num_workers
        )
        missing = set(source.missing)
        present = [picture for i, picture in enumerate(pictures) if i not in missing]
        report.findings += find_bad_pictures(present, name)
        report.findings += find_wrong_sizes(pictures, sizes, name)
        sizes = sizes.copy()
        for index, picture in enumerate(pictures):
            if not picture.error:
                sizes[index] = picture.size
    report.findings += find_bad_boxes(examined, sizes, name)
    counts = _count(examined)
    if name == "train":
        report.findings += find_bad_classes(counts, name)
    report.summaries.append(
        Summary(
            split=name,
            source=f"{files.annotations}, {files.images}",
            images=len(examined.file_names),
            counts=counts,
            areas=examined.areas,
            decoded=None if pictures is None else sum(not p.error for p in pictures),
        )
    )
    return _Split(files, examined, pictures)


def _count(examined: Examined) -> dict[str, int]:
    """Return the number of objects by category name."""
    ids, numbers = np.unique(examined.category_ids, return_counts=True)
    found = dict(zip(ids.tolist(), numbers.tolist(), strict=True))
    return {name: found.get(key, 0) for key, name in sorted(examined.categories.items())}


def _compare(train: _Split, val: _Split) -> list[Finding]:
    """Return the findings of categories that differ between the splits, and of listed copies."""
    both = "train and val"
    findings = []
    known, names = train.examined.categories, val.examined.categories
    unknown = sorted(set(val.examined.category_ids.tolist()) - set(known))
    if unknown:
        examples = [f"{key} ({names[key]})" for key in unknown]
        meaning = "val has objects of categories that train lacks: training stops at the start."
        findings.append(
            Finding("error", "categories that train lacks", both, len(unknown), meaning, examples)
        )
    renamed = [key for key in sorted(set(known) & set(names)) if known[key] != names[key]]
    if renamed:
        examples = [f"{key}: {known[key]} in train, {names[key]} in val" for key in renamed]
        meaning = "The same id means different things, so the metrics are wrong."
        kind = "categories with two names"
        findings.append(Finding("warning", kind, both, len(renamed), meaning, examples))
    if train.files.images == val.files.images and train.pictures is None:
        shared = sorted(set(train.examined.file_names) & set(val.examined.file_names))
        if shared:
            meaning = "The metrics are too good: remove them from train or from val."
            findings.append(
                Finding("warning", "images in both splits", both, len(shared), meaning, shared)
            )
    return findings


def _open_as_trainer(splits: Mapping[str, _Split], with_masks: bool) -> list[Finding]:
    """Open the splits as the trainer does; return the finding of an error."""
    label_map = None
    for name, split in splits.items():
        try:
            data = CocoImages(
                split.files.images,
                split.files.annotations,
                with_masks=with_masks,
                label_map=label_map,
                only=split.files.only,
            )
        except DataError as error:
            return [_unopened(name, error)]
        label_map = data.label_to_category
    return []
