"""Data for the trainers: images, archives, samplers and transforms. Imports nothing else of ours.

    train = build_dataset("IMNET", path, "train", load_tar=True, transform=build_transform(True))
    sampler = RepeatedAugSampler(len(train), rank=rank, world_size=world_size, seed=seed)
    loader = DataLoader(SeededDataset(train), sampler=sampler, batch_size=128)

The embedded data is apart, in `datasets.embedded`: `write_digits(root)`.
"""

from datasets.archives import TarArchive
from datasets.build import build_dataset
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
    "TarArchive",
    "DataError",
    "CorruptImageError",
]
