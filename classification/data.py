"""The data sets and loaders of the trainer, built from its configuration."""

from collections.abc import Sequence

import torch
from torch.utils.data import DataLoader

from classification.config import ClassificationConfig
from datasets import (
    DistributedShuffleSampler,
    EvalSampler,
    RepeatedAugSampler,
    ResilientDataset,
    SeededDataset,
    SplitOptions,
    build_byte_transform,
    build_dataset,
    collate_augmented,
    collate_pixels,
)
from engine import UsageError, rank, shield_worker, world_size

__all__ = ["build_split", "train_loader", "eval_loader"]


def build_split(
    config: ClassificationConfig, split: str, classes: Sequence[str] | None = None
) -> ResilientDataset:
    """Open one split of the data set with its transform to bytes.

    Args:
        config: The configuration.
        split: `train` or `val`.
        classes: Class names of the training split, for `val`; None reads them from the split.

    Raises:
        DataError: The data is missing, empty or damaged, or has a class that training lacks.
        UsageError: timm does not have the augmentation, or the device does not have its operations.
    """
    try:
        transform = build_byte_transform(
            split == "train",
            decoder=config.decoder,
            augment_on=config.augment_on,
            input_size=config.image_size,
            augment=config.augment,
            color_jitter=config.color_jitter,
            aa=config.aa,
            train_interpolation=config.train_interpolation,
            reprob=config.reprob,
            remode=config.remode,
            recount=config.recount,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    split_options = None
    if config.train_val_split is not None:
        split_options = SplitOptions(config.train_val_split, config.split_seed)
    return build_dataset(
        config.data_set,
        config.data_path,
        split,
        transform=transform,
        load_tar=config.load_tar,
        classes=classes,
        inat_category=config.inat_category,
        max_bad_fraction=config.max_bad_fraction,
        train_val_split=split_options,
        max_train_samples=config.max_train_samples,
        split_seed=config.split_seed,
    )


def train_loader(
    dataset: ResilientDataset, config: ClassificationConfig, device: torch.device
) -> DataLoader:
    """Return the training batches of this process.

    `loader.sampler.set_epoch(epoch, start)` sets the epoch and the first sample.
    """
    kind = RepeatedAugSampler if config.repeated_aug else DistributedShuffleSampler
    sampler = kind(len(dataset), rank=rank(), world_size=world_size(), seed=config.seed)
    return DataLoader(
        SeededDataset(dataset),
        batch_size=config.batch_size,
        sampler=sampler,
        drop_last=True,
        collate_fn=collate_augmented,
        **_loader_options(config, device),
    )


def eval_loader(
    dataset: ResilientDataset,
    config: ClassificationConfig,
    device: torch.device,
    batches: int | None = None,
) -> DataLoader:
    """Return the evaluation batches of this process, or all batches without `dist_eval`.

    No image is repeated to fill a batch.

    Args:
        dataset: The validation set.
        config: The configuration.
        device: Device to pin memory for.
        batches: Number of batches of each process, read without workers; None for all batches.
    """
    process, processes = (rank(), world_size()) if config.dist_eval else (0, 1)
    size = len(dataset)
    options = _loader_options(config, device)
    if batches is not None:
        size = min(size, batches * config.batch_size * processes)
        options |= {"num_workers": 0, "persistent_workers": False}
    sampler = EvalSampler(size, batch_size=config.batch_size, rank=process, world_size=processes)
    return DataLoader(
        SeededDataset(dataset),
        batch_size=config.batch_size,
        sampler=sampler,
        collate_fn=collate_pixels,
        **options,
    )


def _loader_options(config: ClassificationConfig, device: torch.device) -> dict:
    """Return the DataLoader options that training and evaluation share."""
    return {
        "num_workers": config.num_workers,
        "pin_memory": config.pin_mem and device.type == "cuda",
        "persistent_workers": config.num_workers > 0,
        "worker_init_fn": shield_worker,
    }
