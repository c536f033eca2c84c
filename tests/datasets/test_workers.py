"""Data loader workers, forked and spawned, against no workers: bytes, randomness, counts."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from datasets import (
    CorruptImageError,
    DataError,
    DistributedShuffleSampler,
    ResilientDataset,
    SeededDataset,
    TarArchive,
)

Loaded = tuple[list[Any], ResilientDataset]

EPOCHS = 2


class Members(Dataset[tuple[Any, int]]):
    """The bytes of each member, with a draw from every generator that augmentation uses."""

    classes = ("only",)

    def __init__(self, archive: TarArchive, corrupt: frozenset[int]) -> None:
        self.archive = archive
        self.corrupt = corrupt

    def __len__(self) -> int:
        return len(self.archive)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if index in self.corrupt:
            raise CorruptImageError(f"corrupt image {self.archive.names[index]}")
        draws = (random.random(), np.random.uniform(), torch.rand(()).item())
        return (self.archive.read_at(index), draws), index


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    """Members of many sizes, up to a few pages; every one different."""
    draw = np.random.RandomState(0)
    return {f"{i:04d}.png": draw.bytes(1 + draw.randint(9000)) for i in range(101)}


@pytest.fixture(scope="module")
def archive(
    files: dict[str, bytes],
    tmp_path_factory: pytest.TempPathFactory,
    write_tar: Callable[..., Path],
) -> TarArchive:
    return TarArchive(write_tar(tmp_path_factory.mktemp("data") / "train.tar", files))


def load(archive: TarArchive, workers: int, method: str | None) -> Loaded:
    """Goes through two epochs of the archive, two of whose images are corrupt."""
    # Opened before the workers start, which is what breaks readers that share a file position.
    archive.read_at(0)
    resilient = ResilientDataset(Members(archive, frozenset({7, 40})), max_bad_fraction=1)
    sampler = DistributedShuffleSampler(len(resilient), seed=3)
    loader = DataLoader(
        SeededDataset(resilient),
        sampler=sampler,
        batch_size=None,
        num_workers=workers,
        multiprocessing_context=method,
        persistent_workers=workers > 0,
    )
    samples = []
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        samples += list(loader)
    return samples, resilient


@pytest.fixture(scope="module")
def alone(archive: TarArchive) -> Loaded:
    return load(archive, 0, None)


@pytest.fixture(scope="module", params=["fork", "spawn"])
def shared(request: pytest.FixtureRequest, archive: TarArchive) -> Loaded:
    return load(archive, 2, request.param)


def test_every_byte_is_right(shared: Loaded, files: dict[str, bytes]) -> None:
    samples, _ = shared
    assert len(samples) == EPOCHS * len(files)
    assert all(data == files[f"{index:04d}.png"] for (data, _), index in samples)


def test_samples_and_their_randomness_are_those_of_no_workers(
    shared: Loaded, alone: Loaded
) -> None:
    assert shared[0] == alone[0]
    for generator in range(3):
        assert len({draws[generator] for (_, draws), _ in alone[0]}) == len(alone[0])


def test_corrupt_images_are_replaced_alike_and_counted_together(
    shared: Loaded, alone: Loaded
) -> None:
    for samples, resilient in (shared, alone):
        targets = [target for _, target in samples]
        assert targets.count(7) == targets.count(40) == 0
        assert targets.count(8) == targets.count(41) == 2 * EPOCHS
        assert resilient.bad_count == 2 * EPOCHS


def test_an_error_in_a_worker_arrives_as_one_sentence(archive: TarArchive) -> None:
    members = Members(archive, frozenset(range(0, 101, 2)))
    dataset = ResilientDataset(members, max_bad_fraction=0.1, min_bad=8)
    loader = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context="fork")
    with pytest.raises(DataError) as caught:
        list(loader)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert "images read are corrupt, more than the allowed share of 0.1" in sentence
    assert not sentence.startswith("datasets.")
