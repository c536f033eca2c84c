"""Tests of `max_train_samples`: the same number of each class, nested, and chosen by a seed."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from datasets import DataError, build_dataset
from datasets.embedded import write_digits
from datasets.subset import choose_images


@pytest.fixture(scope="module")
def targets() -> np.ndarray:
    return np.random.default_rng(0).choice(5, size=200, p=[0.1, 0.15, 0.2, 0.25, 0.3])


@pytest.mark.parametrize("count", [1, 4, 5, 13, 50])
def test_each_class_has_the_same_number_up_to_one(targets: np.ndarray, count: int) -> None:
    chosen = choose_images(targets, count, seed=3)
    assert len(set(chosen.tolist())) == count
    shares = np.bincount(targets[chosen], minlength=5)
    assert shares.max() - shares.min() <= 1


def test_a_class_with_too_few_images_gives_all_of_them() -> None:
    targets = np.array([0] * 3 + [1] * 20)
    chosen = choose_images(targets, 12, seed=0)
    assert np.bincount(targets[chosen]).tolist() == [3, 9]


def test_smaller_choices_are_subsets_of_larger_ones(targets: np.ndarray) -> None:
    choices = [set(choose_images(targets, n, seed=1).tolist()) for n in (1, 7, 40, 199, 200)]
    assert all(a < b for a, b in pairwise(choices))
    assert choices[-1] == set(range(200))


def test_the_seed_decides_the_choice(targets: np.ndarray) -> None:
    first, again, other = (choose_images(targets, 20, seed).tolist() for seed in (0, 0, 1))
    assert first == again != other


def test_more_images_than_there_are_is_refused(targets: np.ndarray) -> None:
    with pytest.raises(DataError, match=r"must be at most 200, .*, got 201"):
        choose_images(targets, 201, seed=0)


@pytest.mark.parametrize("load_tar", [False, True])
def test_a_part_of_the_digits_is_opened(tmp_path: Path, load_tar: bool, caplog) -> None:
    root = write_digits(tmp_path / "digits")
    caplog.set_level("INFO")
    options = {"load_tar": load_tar, "max_train_samples": 50, "split_seed": 2}
    train = build_dataset("DIGITS", root, "train", **options)
    val = build_dataset("DIGITS", root, "val", **options)
    assert (len(train), len(val)) == (50, 359)
    assert len(train.classes) == 10
    assert np.bincount([train[i][1] for i in range(50)]).tolist() == [5] * 10
    assert "50 of 1438 training images, chosen with seed 2" in caplog.text
    with pytest.raises(DataError, match=r"at most 1438, .*, got 1439"):
        build_dataset("DIGITS", root, "train", max_train_samples=1439)
