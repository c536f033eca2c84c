"""Data sets, archives, samplers and transforms for the two trainers.

This package imports no other package of the project. Classification:

    train = build_dataset("IMNET", path, "train", load_tar=True, transform=build_transform(True))
    sampler = RepeatedAugSampler(len(train), rank=rank, world_size=world_size, seed=seed)
    loader = DataLoader(SeededDataset(train), sampler=sampler, batch_size=128)

Detection:

    train = build_coco("train", path, transforms=build_coco_transforms("train"))
    sampler = DistributedShuffleSampler(len(train), rank=rank, world_size=world_size, seed=seed)
    data = SeededDataset(ResilientDataset(train))
    loader = DataLoader(data, sampler=sampler, batch_size=2, collate_fn=collate)

In a seeded data set, the randomness of a sample depends only on (seed, epoch, position in the
epoch). `SeededDataset` and the samplers provide this together. `ResilientDataset` replaces corrupt
images.

Two small data sets need no download. `datasets.embedded.write_digits(root)` writes handwritten
digits to classify, `datasets.scenes.write_scenes(root)` writes scenes of digits to detect.

`python -m datasets.check` finds the problems of a data set, and `python -m datasets.convert`
converts annotations of other formats to COCO's.
"""

from datasets.archives import TarArchive, ZipArchive
from datasets.build import build_dataset
from datasets.coco import CocoImages, build_coco
from datasets.coco_transforms import build_coco_transforms, collate
from datasets.errors import CorruptImageError, DataError
from datasets.imagenet import FolderImages, TarImages, build_imagenet
from datasets.inaturalist import INaturalistImages
from datasets.resilient import ResilientDataset
from datasets.samplers import (
    DistributedShuffleSampler,
    EvalSampler,
    RepeatedAugSampler,
    SeededDataset,
)
from datasets.saved_split import SplitOptions
from datasets.transforms import build_transform

__all__ = [
    "build_dataset",
    "build_imagenet",
    "build_transform",
    "FolderImages",
    "TarImages",
    "INaturalistImages",
    "ResilientDataset",
    "SeededDataset",
    "RepeatedAugSampler",
    "DistributedShuffleSampler",
    "EvalSampler",
    "SplitOptions",
    "build_coco",
    "build_coco_transforms",
    "CocoImages",
    "collate",
    "TarArchive",
    "ZipArchive",
    "DataError",
    "CorruptImageError",
]
