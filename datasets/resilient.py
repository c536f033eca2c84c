"""Replacement of corrupt images, with a limit on their fraction.

A few corrupt images must not stop a training of several days, but many of them, for example on a
broken disk, must stop it. A corrupt image is logged with its name, counted and replaced by the next
readable one. The replacement depends only on the data, so a run is reproducible for any number of
workers.
"""

import itertools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from datasets.errors import CHECK_COMMAND, CorruptImageError, DataError
from datasets.images import ImageDataset

__all__ = ["ResilientDataset"]

logger = logging.getLogger(__name__)

_SEEN, _BAD = 0, 1


class ResilientDataset(Dataset[tuple[Any, Any]]):
    """A data set that replaces images which raise `CorruptImageError`.

    It counts all reads and the bad reads, that is, those of corrupt images. The counts are in
    shared memory, so a process and its `DataLoader` workers, forked or spawned, share them. They
    have no lock, because a lost count hardly changes the fraction. Each process of a distributed
    run has its own counts.

    Args:
        dataset: Data set to wrap.
        max_bad_fraction: Maximum fraction of bad reads among all reads. Reading stops above
            it; with 0 it stops at the first bad read.
        min_bad: Number of bad reads from which on the fraction is checked. It prevents a stop when
            one of the first images happens to be corrupt.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self, dataset: ImageDataset, *, max_bad_fraction: float = 0.01, min_bad: int = 10
    ) -> None:
        if not 0 <= max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction must be in [0, 1], got {max_bad_fraction}")
        if min_bad < 1:
            raise ValueError(f"min_bad must be at least 1, got {min_bad}")
        self.dataset = dataset
        self.max_bad_fraction = max_bad_fraction
        self.min_bad = min_bad if max_bad_fraction else 1
        self._counts = torch.zeros(2, dtype=torch.int64).share_memory_()
        self._logged: set[int] = set()

    @property
    def classes(self) -> Sequence[str]:
        """Class names in the order of their numbers."""
        return self.dataset.classes

    @property
    def bad_count(self) -> int:
        """Number of bad reads so far, including those of all workers."""
        return int(self._counts[_BAD])

    def warn_if_bad(self) -> None:
        """Log the number of bad reads so far, if there are any; their names are logged already."""
        if self.bad_count:
            logger.warning("%d images could not be read and were replaced", self.bad_count)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """Return the sample at `index`, or at the next index that can be read.

        Raises:
            DataError: More images are corrupt than `max_bad_fraction` allows, or all of them are.
        """
        for candidate in itertools.chain(range(index, len(self)), range(index)):
            self._counts[_SEEN] += 1
            try:
                return self.dataset[candidate]
            except CorruptImageError as error:
                self._count_bad(candidate, error)
                last = error
        raise DataError(
            f"none of the {len(self)} images can be read; the last one: {last}; {CHECK_COMMAND}"
        )

    def _count_bad(self, index: int, error: CorruptImageError) -> None:
        """Count and log a bad read; raise `DataError` above the maximum fraction."""
        self._counts[_BAD] += 1
        seen, bad = self._counts.tolist()
        if index not in self._logged:
            self._logged.add(index)
            logger.warning("%s: replaced by another image (%d replaced so far)", error, bad)
        if bad >= self.min_bad and bad > self.max_bad_fraction * seen:
            raise DataError(
                f"{bad} of {seen} images read are corrupt, more than the maximum fraction of "
                f"{self.max_bad_fraction:g} (max_bad_fraction); the last one: {error}; "
                f"{CHECK_COMMAND}"
            ) from error
