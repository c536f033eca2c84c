"""The check of a data set for the classification trainer."""

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from datasets.build import build_dataset
from datasets.check.across import find_copies
from datasets.check.classes import find_bad_classes
from datasets.check.findings import Finding, Report, Summary
from datasets.check.pixels import Picture, find_bad_pictures, read_pictures
from datasets.errors import DataError
from datasets.imagenet import FolderImages
from datasets.images import IMAGE_EXTENSIONS, LabeledImages
from datasets.names import DataSetName, InatCategory
from datasets.saved_split import SplitOptions

__all__ = ["check_folders"]

# Formats of photographs that the trainers do not read.
_OTHER_FORMATS = (".heic", ".heif", ".avif", ".gif", ".jfif", ".jp2", ".jxl", ".cr2", ".dng")
# ImageNet has a few EXIF-rotated images. More of them come from a phone or a camera.
_MANY_ROTATED = 0.01


def check_folders(
    data_path: str | os.PathLike[str],
    *,
    data_set: DataSetName = "IMNET",
    load_tar: bool = False,
    inat_category: InatCategory = "name",
    read_images: bool = False,
    num_workers: int = 0,
    train_val_split: SplitOptions | None = None,
) -> Report:
    """Check class folders, tars of class folders, or iNaturalist.

    Args:
        data_path: Folder of the data set, as for `build_dataset`.
        data_set: Name of the data set, except `CIFAR`.
        load_tar: Read `train.tar` and `val.tar`.
        inat_category: Taxonomic rank of the classes of iNaturalist.
        read_images: Decode all images.
        num_workers: Number of processes that decode.
        train_val_split: Use a part of the training images for validation, as for `build_dataset`.
    """
    report = Report(str(data_path))
    splits: dict[str, LabeledImages] = {}
    pictures: dict[str, list[Picture]] = {}
    for name in ("train", "val"):
        try:
            images = build_dataset(
                data_set,
                data_path,
                name,
                load_tar=load_tar,
                inat_category=inat_category,
                train_val_split=train_val_split,
            ).dataset
        except DataError as error:
            report.findings.append(Finding("error", "cannot be opened", name, 1, f"{error}."))
            continue
        splits[name] = images
        counts = _count(images)
        if name == "train":
            report.findings += find_bad_classes(counts, name, unit="image")
        if read_images:
            pictures[name] = read_pictures(
                images, images.names, title=f"decode {name}", num_workers=num_workers
            )
            report.findings += find_bad_pictures(pictures[name], name)
            report.findings += _find_rotated(pictures[name], name)
        decoded = sum(not picture.error for picture in pictures[name]) if read_images else None
        report.summaries.append(
            Summary(name, str(images.source), len(images), counts, decoded=decoded)
        )
    report.findings += _find_skipped(splits)
    if len(splits) == 2:
        report.findings += _compare(_count(splits["train"]), _count(splits["val"]))
    classes = {
        name: [images.classes[target] for target in images.targets.tolist()]
        for name, images in splits.items()
    }
    report.findings += find_copies(pictures, classes)
    return report


def _count(images: LabeledImages) -> dict[str, int]:
    """Return the number of images by class name."""
    numbers = np.bincount(images.targets, minlength=len(images.classes)).tolist()
    return dict(zip(images.classes, numbers, strict=True))


def _compare(train: Mapping[str, int], val: Mapping[str, int]) -> list[Finding]:
    """Return the findings of classes that only one split has."""
    findings = []
    unknown = [name for name in val if name not in train]
    if unknown:
        meaning = "val has classes that train lacks: training stops at the start."
        kind = "classes that train lacks"
        findings.append(Finding("error", kind, "train and val", len(unknown), meaning, unknown))
    unseen = [name for name, count in train.items() if count and not val.get(name)]
    if unseen:
        meaning = "The metrics do not measure them."
        kind = "classes without validation images"
        findings.append(Finding("note", kind, "val", len(unseen), meaning, unseen))
    return findings


def _find_skipped(splits: Mapping[str, LabeledImages]) -> list[Finding]:
    """Return the findings of files and class folders that a folder has but training skips."""
    # With a split by seed, both splits are in one folder.
    folders: dict[Path, list[str]] = {}
    for name, images in splits.items():
        if isinstance(images, FolderImages):
            folders.setdefault(images.root, []).append(name)
    findings = []
    for root, names in folders.items():
        used = {file for name in names for file in splits[name].names}
        skipped, empty = _compare_files(root, used)
        split = " and ".join(names)
        if skipped:
            kinds = ", ".join(sorted({Path(name).suffix.lower() for name in skipped}))
            meaning = f"Outside of class folders or in a format that is not read ({kinds})."
            findings.append(
                Finding("warning", "skipped images", split, len(skipped), meaning, skipped)
            )
        if empty:
            meaning = "They do not become classes."
            kind = "class folders without images"
            findings.append(Finding("warning", kind, split, len(empty), meaning, empty))
    return findings


def _compare_files(root: Path, used: set[str]) -> tuple[list[str], list[str]]:
    """Return the images and the innermost folders below `root` that are not used."""
    parents = {Path(name).parent.as_posix() for name in used}
    skipped, empty = [], []
    for folder, children, files in os.walk(root, followlinks=True):
        relative = Path(folder).relative_to(root).as_posix()
        if relative != "." and not children and relative not in parents:
            empty.append(relative)
        for file in files:
            name = file if relative == "." else f"{relative}/{file}"
            known = file.lower().endswith(IMAGE_EXTENSIONS + _OTHER_FORMATS)
            if name not in used and known and not file.startswith("."):
                skipped.append(name)
    return sorted(skipped), sorted(empty)


def _find_rotated(pictures: list[Picture], split: str) -> list[Finding]:
    """Return the finding of images with EXIF rotation, which training uses as stored."""
    rotated = [picture for picture in pictures if picture.orientation != 1]
    if not rotated:
        return []
    numbers = Counter(picture.orientation for picture in rotated)
    words = ", ".join(f"{numbers[key]} with {key}" for key in sorted(numbers))
    meaning = (
        f"Training uses the pixels as stored, as timm and torchvision do ({words}). Save them "
        "upright if that is wrong."
    )
    level = "warning" if len(rotated) >= _MANY_ROTATED * len(pictures) else "note"
    examples = [f"{picture.name}: orientation {picture.orientation}" for picture in rotated]
    return [Finding(level, "EXIF-rotated images", split, len(rotated), meaning, examples)]
