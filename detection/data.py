"""The data sets and loaders of the trainer, built from its configuration."""

from collections.abc import Mapping

import torch
from torch.utils.data import DataLoader, Sampler

from datasets import (
    DistributedShuffleSampler,
    EvalSampler,
    ResilientDataset,
    SeededDataset,
    SplitOptions,
    build_coco,
    build_coco_transforms,
    collate,
)
from datasets.scenes import write_scenes
from detection.config import DetectionConfig
from engine import rank, shield_worker, world_size

__all__ = ["build_split", "train_loader", "eval_loader"]


def build_split(
    config: DetectionConfig, split: str, label_map: Mapping[int, int] | None = None
) -> ResilientDataset:
    """Open one split of the data set with its transform.

    Args:
        config: The configuration.
        split: `train` or `val`.
        label_map: Category id of each label of the training split, for `val`; None reads them from
            the split.

    Raises:
        DataError: Images or annotations are missing or damaged, or have a category that training
            lacks.
    """
    if config.dataset_file == "scenes":
        write_scenes(config.coco_path)
    images, annotations = config.own_data[:2] if split == "train" else config.own_data[2:]
    split_options = None
    if config.train_val_split is not None:
        split_options = SplitOptions(config.train_val_split, config.split_seed)
        images, annotations = config.own_data[:2]
    dataset = build_coco(
        split,
        config.coco_path,
        images=images,
        annotations=annotations,
        transforms=build_coco_transforms(
            split,
            augment=config.augment,
            image_size=config.image_size,
            normalize=False,
            decoder=config.decoder,
        ),
        with_masks=config.masks,
        label_map=label_map,
        train_val_split=split_options,
    )
    return ResilientDataset(dataset, max_bad_fraction=config.max_bad_fraction)


def train_loader(
    dataset: ResilientDataset, config: DetectionConfig, device: torch.device
) -> DataLoader:
    """Return the training batches of this process.

    `loader.sampler.set_epoch(epoch, start)` sets the epoch and the first sample.
    """
    sampler = DistributedShuffleSampler(
        len(dataset), rank=rank(), world_size=world_size(), seed=config.seed
    )
    return _loader(dataset, sampler, config, device, drop_last=True)


def eval_loader(
    dataset: ResilientDataset,
    config: DetectionConfig,
    device: torch.device,
    batches: int | None = None,
) -> DataLoader:
    """Return the evaluation batches of this process; no image is repeated to fill a batch.

    Args:
        dataset: The validation set.
        config: The configuration.
        device: Device to pin memory for.
        batches: Number of batches of each process, read without workers; None for all batches.
    """
    size = len(dataset)
    if batches is not None:
        size = min(size, batches * config.batch_size * world_size())
        config = config.model_copy(update={"num_workers": 0})
    sampler = EvalSampler(size, batch_size=config.batch_size, rank=rank(), world_size=world_size())
    return _loader(dataset, sampler, config, device, drop_last=False)


def _loader(
    dataset: ResilientDataset,
    sampler: Sampler,
    config: DetectionConfig,
    device: torch.device,
    *,
    drop_last: bool,
) -> DataLoader:
    """Return the loader of a sampler."""
    return DataLoader(
        SeededDataset(dataset),
        batch_size=config.batch_size,
        sampler=sampler,
        drop_last=drop_last,
        collate_fn=collate,
        num_workers=config.num_workers,
        pin_memory=device.type == "cuda",
        persistent_workers=config.num_workers > 0,
        worker_init_fn=shield_worker,
    )
