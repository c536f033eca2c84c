"""Tests of `SeededDataset`: a sample depends only on its index and seed."""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from datasets import FolderImages, RepeatedAugSampler, SeededDataset, build_transform


class Draws(Dataset[tuple[torch.Tensor, int]]):
    """A data set of random numbers from every generator that augmentation uses."""

    classes = ("only",)

    def __len__(self) -> int:
        return 11

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        drawn = [random.random(), np.random.uniform(), torch.rand(()).item()]
        return torch.tensor([index, *drawn], dtype=torch.float64), 0


def test_an_augmented_image_depends_only_on_the_seed(
    tree: dict[str, bytes], write_folder: Callable[..., Path], tmp_path: Path
) -> None:
    transform = build_transform(True, input_size=64, reprob=1.0)
    dataset = SeededDataset(FolderImages(write_folder(tmp_path / "train", tree), transform))
    first, other = dataset[(3, 17)][0], dataset[(3, 18)][0]
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)
    assert torch.equal(dataset[(3, 17)][0], first)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("fails", [False, True], ids=["drawn", "failed"])
def test_the_states_of_the_generators_are_restored(fails: bool) -> None:
    def generators() -> list[float]:
        return [random.random(), np.random.uniform(), torch.rand(()).item()]

    def reseed() -> None:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)

    class Failing(Draws):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            super().__getitem__(index)
            raise OSError("unreadable")

    reseed()
    expected = generators()
    reseed()
    if fails:
        with pytest.raises(OSError, match="unreadable"):
            SeededDataset(Failing())[(0, 5)]
    else:
        SeededDataset(Draws())[(0, 5)]
    assert generators() == expected


def test_copies_of_one_image_are_augmented_differently() -> None:
    dataset = SeededDataset(Draws())
    copies = [dataset[pair][0] for pair in RepeatedAugSampler(11)][:3]
    assert copies[0][0] == copies[1][0] == copies[2][0]
    assert len({tuple(copy.tolist()) for copy in copies}) == 3
