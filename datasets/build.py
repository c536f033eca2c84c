"""The classification data sets, opened by the names that DeiT uses for `--data-set`."""

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR100

from datasets.errors import DataError
from datasets.imagenet import Split, build_imagenet
from datasets.images import LabeledImages
from datasets.inaturalist import INaturalistImages
from datasets.names import DataSetName, InatCategory
from datasets.resilient import ResilientDataset
from datasets.saved_split import SplitOptions
from datasets.subset import choose_images

__all__ = ["build_dataset"]

logger = logging.getLogger(__name__)

_WITH_FOLDERS = ("IMNET", "DIGITS", "DIRECTIONS")


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
    max_train_samples: int | None = None,
    split_seed: int = 0,
) -> ResilientDataset:
    """Open one split of a data set; `len(dataset.classes)` is its number of classes.

    A corrupt image is replaced by another one, see `ResilientDataset`.

    Args:
        data_set: `CIFAR` (CIFAR-100), `IMNET` (class folders or tars, see `imagenet`), `INAT`
            (iNaturalist 2018), `INAT19`, `DIGITS` (handwritten digits, see `embedded`) or
            `DIRECTIONS` (two digits, see `directions`). The last two are written at the first use.
        data_path: Folder of the data.
        split: `train` or `val`.
        transform: Function applied to the PIL RGB image.
        load_tar: Read `<split>.tar` without unpacking it; not for CIFAR and iNaturalist.
        classes: Class names of the training split; they give the classes of another split of
            a data set in class folders the same numbers.
        inat_category: Taxonomic rank that iNaturalist images are classified by.
        download: Let torchvision download CIFAR-100 or iNaturalist if it is missing. In a
            distributed run, download with one process first.
        max_bad_fraction: Maximum fraction of corrupt images among the images read.
        train_val_split: Use a part of the training images for validation; only for `IMNET`.
        max_train_samples: Number of training images to use, the same number of each class (see
            `subset`); None uses all. It has no effect on the validation split.
        split_seed: Seed of the choice of `max_train_samples`.

    Raises:
        DataError: The data is missing, empty or damaged, or `load_tar` or `train_val_split` is set
            for a data set that does not support it, or there are fewer than `max_train_samples`.
        ValueError: The data set or the split is unknown.
    """
    allowed = get_args(DataSetName)
    if data_set not in allowed:
        raise ValueError(f"data_set must be one of {', '.join(allowed)}, got {data_set!r}")
    if split not in ("train", "val"):
        raise ValueError(f"split must be train or val, got {split!r}")
    if train_val_split is not None and data_set != "IMNET":
        raise DataError(f"--train_val_split is for IMNET: {data_set} has a validation split")
    if load_tar and data_set not in _WITH_FOLDERS:
        raise DataError(f"--load-tar is for IMNET, DIGITS and DIRECTIONS: {data_set} has no tars")

    dataset: LabeledImages | CIFAR100
    if data_set in _WITH_FOLDERS:
        # `python -m datasets.embedded` imports this module first. An import of datasets.embedded at
        # the top would then load that module twice.
        if data_set == "DIGITS":
            from datasets.embedded import write_digits

            write_digits(data_path)
        if data_set == "DIRECTIONS":
            from datasets.directions import write_directions

            write_directions(data_path)
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
    if max_train_samples is not None and split == "train":
        dataset = _choose(dataset, max_train_samples, split_seed)
    return ResilientDataset(dataset, max_bad_fraction=max_bad_fraction)


def _choose(dataset: LabeledImages | CIFAR100, count: int, seed: int) -> LabeledImages | CIFAR100:
    """Return a part of the images of a data set, with the same classes."""
    total = len(dataset)
    positions = choose_images(np.asarray(dataset.targets), count, seed)
    if isinstance(dataset, CIFAR100):
        dataset.data = dataset.data[positions]
        dataset.targets = [dataset.targets[i] for i in positions.tolist()]
    else:
        dataset = dataset.select(positions)
    logger.info("%d of %d training images, chosen with seed %d", count, total, seed)
    return dataset


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
