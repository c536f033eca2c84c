"""Tests of loaders: forked and spawned workers return the same samples as no workers."""

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
    """A data set of member contents, with random numbers from every generator."""

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
    """Different members with sizes of 1 to 9,000 bytes."""
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
    """Load two epochs of an archive with two corrupt images."""
    # Open the file before the workers start. With one shared file position, they would read wrong
    # bytes.
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
def without_workers(archive: TarArchive) -> Loaded:
    return load(archive, 0, None)


@pytest.fixture(scope="module", params=["fork", "spawn"])
def with_workers(request: pytest.FixtureRequest, archive: TarArchive) -> Loaded:
    return load(archive, 2, request.param)


def test_every_byte_is_correct(with_workers: Loaded, files: dict[str, bytes]) -> None:
    samples, _ = with_workers
    assert len(samples) == EPOCHS * len(files)
    assert all(data == files[f"{index:04d}.png"] for (data, _), index in samples)


def test_samples_and_their_randomness_equal_those_without_workers(
    with_workers: Loaded, without_workers: Loaded
) -> None:
    assert with_workers[0] == without_workers[0]
    samples, _ = without_workers
    for generator in range(3):
        assert len({draws[generator] for (_, draws), _ in samples}) == len(samples)


def test_corrupt_images_are_replaced_and_counted_over_all_workers(
    with_workers: Loaded, without_workers: Loaded
) -> None:
    for samples, resilient in (with_workers, without_workers):
        targets = [target for _, target in samples]
        assert targets.count(7) == targets.count(40) == 0
        assert targets.count(8) == targets.count(41) == 2 * EPOCHS
        assert resilient.bad_count == 2 * EPOCHS


def test_an_error_in_a_worker_has_one_sentence(archive: TarArchive) -> None:
    members = Members(archive, frozenset(range(0, 101, 2)))
    dataset = ResilientDataset(members, max_bad_fraction=0.1, min_bad=8)
    loader = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context="fork")
    with pytest.raises(DataError) as caught:
        list(loader)
    message = str(caught.value)
    assert "\n" not in message
    assert "images read are corrupt, more than the maximum fraction of 0.1" in message
    assert not message.startswith("datasets.")
