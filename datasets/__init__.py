"""Data sets, archives, samplers and transforms for the two trainers.

This package imports no other package of the project. Classification:

    transform = build_byte_transform(True)
    train = build_dataset("IMNET", path, "train", load_tar=True, transform=transform)
    sampler = RepeatedAugSampler(len(train), rank=rank, world_size=world_size, seed=seed)
    data = SeededDataset(train)
    loader = DataLoader(data, sampler=sampler, batch_size=128, collate_fn=collate_augmented)
    for images, targets, erasings, operations in loader:
        images = normalize_pixels(apply_operations(images.to(device), operations))
        images = erase(images, erasings, "pixel")

Detection:

    train = build_coco("train", path, transforms=build_coco_transforms("train", normalize=False))
    sampler = DistributedShuffleSampler(len(train), rank=rank, world_size=world_size, seed=seed)
    data = SeededDataset(ResilientDataset(train))
    loader = DataLoader(data, sampler=sampler, batch_size=2, collate_fn=collate)
    for images, mask, targets in loader:
        mask = mask.to(device)
        images = normalize_batch(images.to(device), mask)

In a seeded data set, the randomness of a sample depends only on (seed, epoch, position in the
epoch). `SeededDataset` and the samplers provide this together. `ResilientDataset` replaces corrupt
images.

Three small data sets need no download. `datasets.embedded.write_digits(root)` writes handwritten
digits and `datasets.directions.write_directions(root)` pairs of digits to classify,
`datasets.scenes.write_scenes(root)` writes scenes of digits to detect.

`python -m datasets.check` finds the problems of a data set, and `python -m datasets.convert`
converts annotations of other formats to COCO's.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets.archives import TarArchive, ZipArchive
    from datasets.build import build_dataset
    from datasets.byte_transforms import build_byte_transform
    from datasets.coco import CocoImages, build_coco
    from datasets.coco_batches import collate, normalize_batch
    from datasets.coco_transforms import build_coco_transforms
    from datasets.device_augment import apply_operations
    from datasets.errors import CorruptImageError, DataError
    from datasets.imagenet import FolderImages, TarImages, build_imagenet
    from datasets.inaturalist import INaturalistImages
    from datasets.pixels import collate_augmented, collate_pixels, erase, normalize_pixels
    from datasets.resilient import ResilientDataset
    from datasets.samplers import (
        DistributedShuffleSampler,
        EvalSampler,
        RepeatedAugSampler,
        SeededDataset,
    )
    from datasets.saved_split import SplitOptions
    from datasets.transforms import build_transform

_MODULES = {
    "build_dataset": "build",
    "build_imagenet": "imagenet",
    "build_transform": "transforms",
    "build_byte_transform": "byte_transforms",
    "collate_pixels": "pixels",
    "collate_augmented": "pixels",
    "normalize_pixels": "pixels",
    "apply_operations": "device_augment",
    "erase": "pixels",
    "FolderImages": "imagenet",
    "TarImages": "imagenet",
    "INaturalistImages": "inaturalist",
    "ResilientDataset": "resilient",
    "SeededDataset": "samplers",
    "RepeatedAugSampler": "samplers",
    "DistributedShuffleSampler": "samplers",
    "EvalSampler": "samplers",
    "SplitOptions": "saved_split",
    "build_coco": "coco",
    "build_coco_transforms": "coco_transforms",
    "CocoImages": "coco",
    "collate": "coco_batches",
    "normalize_batch": "coco_batches",
    "TarArchive": "archives",
    "ZipArchive": "archives",
    "DataError": "errors",
    "CorruptImageError": "errors",
}

__all__ = [*_MODULES]


def __getattr__(name: str) -> Any:
    """Import a public name at its first use, so that `--help` does not wait for torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    """Return all names, also those that are not imported yet."""
    return sorted({*globals(), *_MODULES})
