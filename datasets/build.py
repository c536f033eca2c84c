"""The classification data sets, opened by the names that DeiT uses for `--data-set`."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

from PIL import Image
from torchvision.datasets import CIFAR100

from datasets.errors import DataError
from datasets.imagenet import Split, build_imagenet
from datasets.inaturalist import INaturalistImages
from datasets.names import DataSetName, InatCategory
from datasets.resilient import ImageDataset, ResilientDataset
from datasets.saved_split import SplitOptions

__all__ = ["build_dataset"]


def build_dataset(
    data_set: DataSetName,
    data_path: str | os.PathLike[str],
    split: Split,
    *,
    transform: Callable[[Image.Image], Any] | None = None,
    load_tar: bool = False,
    classes: Sequence[str] | None = None,
    inat_category: InatCategory = "name",
    download: bool = False,
    max_bad_fraction: float = 0.01,
    train_val_split: SplitOptions | None = None,
) -> ResilientDataset:
    """Open one split of a data set; `len(dataset.classes)` is its number of classes.

    A corrupt image is replaced by another one, see `ResilientDataset`.

    Args:
        data_set: `CIFAR` (CIFAR-100), `IMNET` (class folders or tars, see `imagenet`), `INAT`
            (iNaturalist 2018), `INAT19`, or `DIGITS` (handwritten digits, see `embedded`; they are
            written at the first use).
        data_path: Folder of the data.
        split: `train` or `val`.
        transform: Function applied to the PIL RGB image.
        load_tar: Read `<split>.tar` without unpacking it; only for `IMNET` and `DIGITS`.
        classes: Class names of the training split; they give the classes of another split of
            `IMNET` or `DIGITS` the same numbers.
        inat_category: Taxonomic rank that iNaturalist images are classified by.
        download: Let torchvision download CIFAR-100 or iNaturalist if it is missing. In a
            distributed run, download with one process first.
        max_bad_fraction: Maximum fraction of corrupt images among the images read.
        train_val_split: Use a part of the training images for validation; only for `IMNET`.

    Raises:
        DataError: The data is missing, empty or damaged, or `load_tar` or `train_val_split` is set
            for a data set that does not support it.
        ValueError: The data set or the split is unknown.
    """
    allowed = get_args(DataSetName)
    if data_set not in allowed:
        raise ValueError(f"data_set must be one of {', '.join(allowed)}, got {data_set!r}")
    if split not in ("train", "val"):
        raise ValueError(f"split must be train or val, got {split!r}")
    if train_val_split is not None and data_set != "IMNET":
        raise DataError(f"--train_val_split is for IMNET: {data_set} has a validation split")
    if load_tar and data_set not in ("IMNET", "DIGITS"):
        raise DataError(f"--load-tar is for IMNET and DIGITS: {data_set} has no tars")

    dataset: ImageDataset
    if data_set in ("IMNET", "DIGITS"):
        if data_set == "DIGITS":
            # `python -m datasets.embedded` imports this module first. An import of
            # datasets.embedded at the top would then load that module twice.
            from datasets.embedded import write_digits

            write_digits(data_path)
        dataset = build_imagenet(
            data_path,
            split,
            load_tar=load_tar,
            transform=transform,
            classes=classes,
            train_val_split=train_val_split,
        )
    elif data_set == "CIFAR":
        dataset = _open_cifar(Path(data_path), split, transform, download)
    else:
        dataset = INaturalistImages(
            data_path,
            "2018" if data_set == "INAT" else "2019",
            split,
            category=inat_category,
            transform=transform,
            download=download,
        )
    return ResilientDataset(dataset, max_bad_fraction=max_bad_fraction)


def _open_cifar(
    root: Path, split: Split, transform: Callable[[Image.Image], Any] | None, download: bool
) -> CIFAR100:
    """Open CIFAR-100 with torchvision."""
    try:
        return CIFAR100(str(root), train=split == "train", transform=transform, download=download)
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"CIFAR-100 cannot be opened, expected {root}/cifar-100-python: {error}"
        ) from error
