"""Which samples a process draws in an epoch, and the seed that each of them is drawn with.

Every sampler yields (index, seed) pairs for `SeededDataset`. The order is a function of (seed,
epoch); the randomness inside a sample is a function of (seed, epoch, position in the order). So
nothing depends on the number of workers or on their state, and an interrupted epoch continues
exactly with `set_epoch(epoch, start)`, without any saved random state.

Repeated augmentation follows Hoffer et al., "Augment your batch" (2019), in the form that DeiT
uses. The order of an epoch is drawn anew in every run, with torchrun or without.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from datasets.images import ImageDataset

# Keeps these seeds apart from seeds that others derive from the same small numbers.
_SEED_DOMAIN = 0xDA7A


class SeededSampler(Sampler[tuple[int, int]], ABC):
    """Base: turns this process's share of the order into (index, seed) pairs.

    Args:
        size: Number of samples in the data set, at least 1.
        rank: This process, from 0.
        world_size: Number of processes.
        seed: The run's seed, at least 0.
    """

    def __init__(self, size: int, *, rank: int = 0, world_size: int = 1, seed: int = 0) -> None:
        if size < 1:
            raise ValueError(f"size must be at least 1, not {size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, {world_size}), not {rank}")
        if seed < 0:
            raise ValueError(f"seed must be at least 0, not {seed}")
        super().__init__()
        self.size = size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.epoch = 0
        self.start = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Chooses the epoch that the next iteration goes through.

        Args:
            epoch: From 0.
            start: Samples of this process to skip, because they were drawn before an interruption.
        """
        if epoch < 0:
            raise ValueError(f"epoch must be at least 0, not {epoch}")
        if not 0 <= start <= len(self):
            raise ValueError(f"start must be in [0, {len(self)}], not {start}")
        self.epoch = epoch
        self.start = start

    @abstractmethod
    def __len__(self) -> int:
        """Samples of this process in a whole epoch, whatever `start` is."""

    @abstractmethod
    def _indices(self) -> np.ndarray:
        """This process's indices in a whole epoch, (len(self),) int64."""

    def _positions(self) -> np.ndarray:
        """Where these stand in the order over all processes, (len(self),) int64."""
        return np.arange(self.rank, len(self) * self.world_size, self.world_size)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        # Kept here: set_epoch must not change an iteration that is under way.
        epoch = self.epoch
        pairs = np.stack([self._indices(), self._positions()], axis=1)[self.start :]
        for index, position in pairs.tolist():
            yield index, _sample_seed(self.seed, epoch, position)


class DistributedShuffleSampler(SeededSampler):
    """Every sample once per epoch, shuffled and dealt out to the processes in turn.

    Where the size does not divide, the first samples of the order come once more at its end, so
    that all processes take the same number of steps.
    """

    def __len__(self) -> int:
        return -(-self.size // self.world_size)

    def _indices(self) -> np.ndarray:
        order = np.resize(_shuffled(self), len(self) * self.world_size)
        return order[self.rank :: self.world_size]


class RepeatedAugSampler(SeededSampler):
    """Repeated augmentation: three differently augmented copies of an image side by side.

    The shuffled order, each index `repeats` times in a row, is dealt out to the processes in
    turn, so the copies of one image meet in one global batch. An epoch keeps the length of a
    plain one rounded down to a multiple of 256, so it shows about a third of the images: another
    third in every epoch. Data of fewer than 256 images is not rounded down.

    Args:
        size: Number of samples in the data set, at least 1.
        rank: This process, from 0.
        world_size: Number of processes.
        seed: The run's seed; 0 gives the published order.
        repeats: Copies of each image.
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
            raise ValueError(f"repeats must be at least 1, not {repeats}")
        self.repeats = repeats

    def __len__(self) -> int:
        rounded = self.size // 256 * 256 // self.world_size
        return rounded or -(-self.size // self.world_size)

    def _indices(self) -> np.ndarray:
        repeated = np.repeat(_shuffled(self), self.repeats)
        return np.resize(repeated, len(self) * self.world_size)[self.rank :: self.world_size]


class EvalSampler(SeededSampler):
    """Every sample exactly once over all processes, in order; `set_epoch` is not needed.

    Whole batches are dealt out in turn: batch b of the data goes to process `b % world_size`. So a
    batch holds the same samples for any number of processes, and what is computed of it is the
    same to the last bit. Nothing is padded: processes may get counts that differ by one batch, and
    none where there are more processes than batches.

    Args:
        size: Number of samples in the data set, at least 1.
        batch_size: Samples in a batch of the loader, at least 1.
        rank: This process, from 0.
        world_size: Number of processes.
    """

    def __init__(self, size: int, *, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(size, rank=rank, world_size=world_size)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        self.batch_size = batch_size

    def __len__(self) -> int:
        return len(self._indices())

    def _indices(self) -> np.ndarray:
        indices = np.arange(self.size)
        return indices[indices // self.batch_size % self.world_size == self.rank]

    def _positions(self) -> np.ndarray:
        return self._indices()


class SeededDataset(Dataset[tuple[Any, Any]]):
    """Draws a sample with python's, numpy's and torch's (CPU) random generators seeded for it.

    The generators get their former state back afterwards, so that the number of workers, 0
    included, changes nothing for anybody else.

    Args:
        dataset: Any map-style data set of (image, target).
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
        """Returns sample `index` as drawn with `seed`, for the pair (index, seed) of a sampler."""
        return self.__getitems__([pair])[0]

    def __getitems__(self, pairs: Sequence[tuple[int, int]]) -> list[tuple[Any, Any]]:
        """Returns the samples of a batch, for the pairs (index, seed) of a sampler."""
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        try:
            return [self._draw(index, seed) for index, seed in pairs]
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])

    def _draw(self, index: int, seed: int) -> tuple[Any, Any]:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        # Not torch.manual_seed: that reseeds every GPU too, whose state is not restored here.
        torch.default_generator.manual_seed(seed)
        return self.dataset[index]


def _sample_seed(seed: int, epoch: int, position: int) -> int:
    """A 63-bit seed for the sample at `position` of the epoch's order over all processes."""
    sequence = np.random.SeedSequence((seed, epoch, position), spawn_key=(_SEED_DOMAIN,))
    return int(sequence.generate_state(1, np.uint64)[0]) >> 1


def _shuffled(sampler: SeededSampler) -> np.ndarray:
    """The epoch's order of all samples, (size,) int64; the same in every process."""
    # torch's CPU generator uses the low 32 bits alone, so seed and epoch are mixed into those; at
    # seed 0 it is the epoch itself, as in the published recipe.
    mixed = (sampler.seed * 0x9E3779B1 + sampler.epoch) % 2**32
    generator = torch.Generator().manual_seed(mixed)
    return torch.randperm(sampler.size, generator=generator).numpy()
