"""Tests of the samplers: the order of DeiT, coverage of the data, continuation of an epoch."""

from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import BatchSampler

from datasets import DistributedShuffleSampler, EvalSampler, RepeatedAugSampler
from datasets.samplers import SeededSampler

GOLDEN = Path(__file__).parents[1] / "golden" / "deit_train.npz"

SHUFFLED = pytest.mark.parametrize(
    "kind", [DistributedShuffleSampler, RepeatedAugSampler], ids=["plain", "repeated"]
)
WORLDS = pytest.mark.parametrize("world", [1, 3, 4], ids="{}_ranks".format)


def draw(sampler: SeededSampler, epoch: int = 0, start: int = 0) -> list[tuple[int, int]]:
    """Return the (index, seed) pairs of an epoch."""
    sampler.set_epoch(epoch, start)
    return list(sampler)


def indices(sampler: SeededSampler, epoch: int = 0) -> list[int]:
    """Return the indices of an epoch."""
    return [index for index, _ in draw(sampler, epoch)]


@pytest.mark.parametrize("rank", range(4), ids="rank{}".format)
@pytest.mark.parametrize("epoch", [0, 1], ids="epoch{}".format)
def test_repeated_augmentation_has_the_indices_of_deit(epoch: int, rank: int) -> None:
    with np.load(GOLDEN) as golden:
        expected = golden[f"ras/n1000_R4_r{rank}_e{epoch}_shuf"].tolist()
    sampler = RepeatedAugSampler(1000, rank=rank, world_size=4, seed=0)
    assert indices(sampler, epoch) == expected
    assert len(sampler) == 192


@SHUFFLED
@WORLDS
def test_every_epoch_has_a_different_order(kind: type[SeededSampler], world: int) -> None:
    sampler = kind(1000, rank=world - 1, world_size=world)
    orders = {tuple(indices(sampler, epoch)) for epoch in range(5)}
    assert len(orders) == 5


@SHUFFLED
def test_order_depends_on_the_seed_and_is_reproducible(
    kind: type[SeededSampler],
) -> None:
    # Seed 1 in epoch 0 must not have the order of seed 0 in epoch 1.
    assert indices(kind(300, seed=1), 0) != indices(kind(300, seed=0), 1)
    assert draw(kind(300, seed=7), 2) == draw(kind(300, seed=7), 2)


@WORLDS
@pytest.mark.parametrize("size", [300, 63], ids="{}_images".format)
def test_repeated_augmentation_reaches_every_image_over_the_epochs(size: int, world: int) -> None:
    samplers = [RepeatedAugSampler(size, rank=rank, world_size=world) for rank in range(world)]
    seen = {i for epoch in range(40) for sampler in samplers for i in indices(sampler, epoch)}
    assert seen == set(range(size))


def test_copies_of_one_image_are_adjacent_over_the_ranks() -> None:
    ranks = [indices(RepeatedAugSampler(600, rank=rank, world_size=4)) for rank in range(4)]
    dealt = np.array(ranks).T.reshape(-1)
    assert len(dealt) == 512
    assert (dealt[:510].reshape(-1, 3) == dealt[:510:3, None]).all()
    assert len(set(dealt[:510:3].tolist())) == 170


def test_copies_of_one_image_have_different_seeds() -> None:
    pairs = draw(RepeatedAugSampler(300))
    assert len({seed for _, seed in pairs}) == len(pairs)


@pytest.mark.parametrize("size", [1, 2, 63, 255, 256, 257, 511, 1438], ids="{}_images".format)
@pytest.mark.parametrize("world", [1, 2, 5, 300], ids="{}_ranks".format)
def test_repeated_augmentation_works_for_any_size(size: int, world: int) -> None:
    samplers = [RepeatedAugSampler(size, rank=r, world_size=world) for r in {0, world - 1}]
    assert {len(sampler) for sampler in samplers} == {len(samplers[0])}
    for sampler in samplers:
        drawn = indices(sampler)
        assert len(drawn) == len(sampler) >= 1
        assert set(drawn) <= set(range(size))


@pytest.mark.parametrize("size", [1, 10, 63, 64], ids="{}_images".format)
@pytest.mark.parametrize("world", [1, 3, 16], ids="{}_ranks".format)
def test_shuffling_draws_every_image_in_every_epoch(size: int, world: int) -> None:
    samplers = [DistributedShuffleSampler(size, rank=r, world_size=world) for r in range(world)]
    drawn = [indices(sampler, epoch=3) for sampler in samplers]
    assert {len(one) for one in drawn} == {-(-size // world)}
    counts = np.bincount(np.concatenate(drawn), minlength=size)
    assert counts.min() >= 1
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("size", [1, 2, 359, 360], ids="{}_images".format)
@pytest.mark.parametrize("batch", [1, 32, 500], ids="batch{}".format)
@pytest.mark.parametrize("world", [1, 2, 7], ids="{}_ranks".format)
def test_evaluation_draws_every_image_exactly_once(size: int, batch: int, world: int) -> None:
    samplers = [EvalSampler(size, batch_size=batch, rank=r, world_size=world) for r in range(world)]
    drawn = [[index for index, _ in sampler] for sampler in samplers]
    assert sorted(index for one in drawn for index in one) == list(range(size))
    assert [len(sampler) for sampler in samplers] == [len(one) for one in drawn]
    assert max(map(len, drawn)) - min(map(len, drawn)) <= batch


@pytest.mark.parametrize("world", [2, 3], ids="{}_ranks".format)
def test_evaluation_has_the_same_batches_as_one_process(world: int) -> None:
    def batches(rank: int, world: int) -> list[list[tuple[int, int]]]:
        sampler = EvalSampler(35, batch_size=4, rank=rank, world_size=world)
        return list(BatchSampler(sampler, batch_size=4, drop_last=False))

    # Both indices and seeds must be equal.
    dealt = [batch for rank in range(world) for batch in batches(rank, world)]
    assert sorted(dealt) == sorted(batches(0, 1))


@SHUFFLED
@pytest.mark.parametrize("start", [0, 1, 50, 85], ids="start{}".format)
def test_continued_epoch_is_the_rest_of_the_whole_epoch(
    kind: type[SeededSampler], start: int
) -> None:
    sampler = kind(300, rank=1, world_size=3, seed=5)
    whole = draw(sampler, epoch=4)
    assert draw(sampler, epoch=4, start=start) == whole[start:]
    assert len(sampler) == len(whole)
    # The next epoch starts at its beginning again.
    assert len(draw(sampler, epoch=5)) == len(whole)


def test_set_epoch_does_not_change_an_iteration_that_has_started() -> None:
    sampler = DistributedShuffleSampler(9)
    expected = draw(sampler, epoch=1)
    started = iter(sampler)
    first = next(started)
    sampler.set_epoch(2, start=4)
    assert [first, *started] == expected


def test_seeds_differ_between_epochs_and_ranks() -> None:
    seeds = [
        {seed for _, seed in draw(DistributedShuffleSampler(64, rank=r, world_size=2), epoch)}
        for r in range(2)
        for epoch in range(3)
    ]
    assert len(set.union(*seeds)) == 6 * 32


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"size": 0}, "size"),
        ({"size": 9, "rank": 2, "world_size": 2}, "rank"),
        ({"size": 9, "rank": -1}, "rank"),
        ({"size": 9, "seed": -1}, "seed"),
        ({"size": 9, "repeats": 0}, "repeats"),
    ],
    ids=["no_data", "rank_too_big", "rank_negative", "seed", "repeats"],
)
def test_an_invalid_argument_is_named(arguments: dict[str, int], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        RepeatedAugSampler(**arguments)


def test_an_invalid_batch_size_of_evaluation_is_named() -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        EvalSampler(9, batch_size=0)


@pytest.mark.parametrize(
    ("epoch", "start", "named"), [(-1, 0, "epoch"), (0, -1, "start"), (0, 10, "start")]
)
def test_an_invalid_epoch_or_start_is_named(epoch: int, start: int, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        DistributedShuffleSampler(9).set_epoch(epoch, start)
