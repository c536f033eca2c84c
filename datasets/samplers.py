"""Samplers for training and evaluation, and the seeded data set that they are used with.

A sampler chooses the samples of one process in an epoch. It yields (index, seed) pairs for
`SeededDataset`, which seeds the random generators before it reads a sample. The order of an epoch
depends only on (seed, epoch). The randomness of a sample, such as its augmentation, depends only on
(seed, epoch, position in the order). Therefore the number of workers has no effect on the samples,
and an interrupted epoch continues exactly after `set_epoch(epoch, start)`, without saved random
states.

Repeated augmentation follows Hoffer et al., "Augment your batch" (2019), in the variant of DeiT.
One thing differs from DeiT: runs without torchrun also shuffle differently in every epoch.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from datasets.images import ImageDataset

__all__ = [
    "SeededSampler",
    "DistributedShuffleSampler",
    "RepeatedAugSampler",
    "EvalSampler",
    "SeededDataset",
]

# This constant makes the seeds differ from those that other code derives from the same numbers.
_SEED_DOMAIN = 0xDA7A


class SeededSampler(Sampler[tuple[int, int]], ABC):
    """Base class: an iterator over the (index, seed) pairs of one process.

    Args:
        size: Number of samples in the data set, at least 1.
        rank: Rank of this process, from 0.
        world_size: Number of processes.
        seed: Seed of the run, at least 0.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(self, size: int, *, rank: int = 0, world_size: int = 1, seed: int = 0) -> None:
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, {world_size}), got {rank}")
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}")
        super().__init__()
        self.size = size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.epoch = 0
        self.start = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Set the epoch of the next iteration.

        Args:
            epoch: Number of the epoch, from 0.
            start: Number of samples of this process to skip, because they were already used before
                an interruption.

        Raises:
            ValueError: An argument is out of range.
        """
        if epoch < 0:
            raise ValueError(f"epoch must be at least 0, got {epoch}")
        if not 0 <= start <= len(self):
            raise ValueError(f"start must be in [0, {len(self)}], got {start}")
        self.epoch = epoch
        self.start = start

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of samples of this process in a whole epoch; `start` does not count."""

    @abstractmethod
    def _indices(self) -> np.ndarray:
        """Return the indices of this process in a whole epoch, (len(self),) int64."""

    def _positions(self) -> np.ndarray:
        """Return the positions of these indices in the order over all processes, int64."""
        return np.arange(self.rank, len(self) * self.world_size, self.world_size)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        # A copy, because set_epoch must not change an iteration that has started.
        epoch = self.epoch
        pairs = np.stack([self._indices(), self._positions()], axis=1)[self.start :]
        for index, position in pairs.tolist():
            yield index, _sample_seed(self.seed, epoch, position)


class DistributedShuffleSampler(SeededSampler):
    """A sampler for training: every sample once per epoch, in shuffled order.

    The processes get the samples of the order round-robin. If the number of samples is not
    divisible by the number of processes, the first samples of the order are repeated at its end, so
    that all processes have the same number of steps.

    Args:
        size: Number of samples in the data set, at least 1.
        rank: Rank of this process, from 0.
        world_size: Number of processes.
        seed: Seed of the run, at least 0.
    """

    def __len__(self) -> int:
        return -(-self.size // self.world_size)

    def _indices(self) -> np.ndarray:
        """Return the indices of this process in a whole epoch."""
        order = np.resize(_shuffled(self), len(self) * self.world_size)
        return order[self.rank :: self.world_size]


class RepeatedAugSampler(SeededSampler):
    """A sampler for repeated augmentation: several differently augmented copies of each image.

    In the shuffled order, each index is repeated `repeats` times. The processes get the samples of
    this order round-robin, so the copies of one image are in the same total batch. An epoch has as
    many samples as without repetition, rounded down to a multiple of 256 (not for fewer than 256
    images). With 3 repeats it therefore has about a third of the images, other ones in every epoch.

    Args:
        size: Number of samples in the data set, at least 1.
        rank: Rank of this process, from 0.
        world_size: Number of processes.
        seed: Seed of the run, at least 0; 0 gives the order of DeiT.
        repeats: Number of copies of each image, at least 1.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        repeats: int = 3,
    ) -> None:
        super().__init__(size, rank=rank, world_size=world_size, seed=seed)
        if repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {repeats}")
        self.repeats = repeats

    def __len__(self) -> int:
        rounded = self.size // 256 * 256 // self.world_size
        return rounded or -(-self.size // self.world_size)

    def _indices(self) -> np.ndarray:
        """Return the indices of this process in a whole epoch."""
        repeated = np.repeat(_shuffled(self), self.repeats)
        return np.resize(repeated, len(self) * self.world_size)[self.rank :: self.world_size]


class EvalSampler(SeededSampler):
    """A sampler for evaluation: every sample exactly once over all processes, in order.

    The processes get whole batches round-robin: batch b goes to process `b % world_size`. So a
    batch has the same samples for any number of processes, and its results are bitwise equal.
    There is no padding: the number of batches may differ by one between processes, and is 0 for
    some if there are more processes than batches. `set_epoch` is not needed.

    Args:
        size: Number of samples in the data set, at least 1.
        batch_size: Batch size of the loader, at least 1.
        rank: Rank of this process, from 0.
        world_size: Number of processes.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(self, size: int, *, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(size, rank=rank, world_size=world_size)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.batch_size = batch_size

    def __len__(self) -> int:
        return len(self._indices())

    def _indices(self) -> np.ndarray:
        """Return the indices of this process in a whole epoch."""
        indices = np.arange(self.size)
        return indices[indices // self.batch_size % self.world_size == self.rank]

    def _positions(self) -> np.ndarray:
        """Return the positions, which equal the indices because nothing is shuffled."""
        return self._indices()


class SeededDataset(Dataset[tuple[Any, Any]]):
    """A seeded data set: the randomness of a sample depends only on (seed, epoch, position).

    It takes the (index, seed) pairs of a `SeededSampler` as indices. Before it reads a sample, it
    seeds the random generators of Python, numpy and torch (CPU) with that seed. Afterwards it
    restores their states, so that reading in the main process, without workers, does not change
    any other random numbers.

    Args:
        dataset: A map-style data set of (image, target).
    """

    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset = dataset

    @property
    def classes(self) -> Sequence[str]:
        """Class names in the order of their numbers."""
        return self.dataset.classes

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, pair: tuple[int, int]) -> tuple[Any, Any]:
        """Return the sample of an (index, seed) pair."""
        return self.__getitems__([pair])[0]

    def __getitems__(self, pairs: Sequence[tuple[int, int]]) -> list[tuple[Any, Any]]:
        """Return the samples of a batch of (index, seed) pairs."""
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        try:
            return [self._draw(index, seed) for index, seed in pairs]
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])

    def _draw(self, index: int, seed: int) -> tuple[Any, Any]:
        """Seed the random generators and read one sample."""
        random.seed(seed)
        np.random.seed(seed % 2**32)
        # torch.manual_seed would also seed the GPUs, whose states are not restored here.
        torch.default_generator.manual_seed(seed)
        return self.dataset[index]


def _sample_seed(seed: int, epoch: int, position: int) -> int:
    """Return the 63-bit seed of the sample at `position` of the epoch's order."""
    sequence = np.random.SeedSequence((seed, epoch, position), spawn_key=(_SEED_DOMAIN,))
    return int(sequence.generate_state(1, np.uint64)[0]) >> 1


def _shuffled(sampler: SeededSampler) -> np.ndarray:
    """Return the epoch's order of all samples, (size,) int64; it is the same in every process."""
    # torch's CPU generator uses only the low 32 bits of a seed, so seed and epoch are mixed into
    # these. With seed 0 the result is the epoch, as in DeiT.
    mixed = (sampler.seed * 0x9E3779B1 + sampler.epoch) % 2**32
    generator = torch.Generator().manual_seed(mixed)
    return torch.randperm(sampler.size, generator=generator).numpy()
