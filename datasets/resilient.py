"""One corrupt image among thousands must not end a run of days; a broken disk must.

A corrupt image is logged by name, counted, and replaced by the next readable one. The replacement
depends on nothing but the data, so a run stays reproducible for any number of workers.
"""

import itertools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from datasets.errors import CorruptImageError, DataError
from datasets.images import ImageDataset

logger = logging.getLogger(__name__)

_SEEN, _BAD = 0, 1


class ResilientDataset(Dataset[tuple[Any, Any]]):
    """Replaces images that raise `CorruptImageError`.

    The counts of images seen and images bad live in shared memory, so that a process and the
    `DataLoader` workers it starts, forked or spawned, count together. They are not locked: a lost
    count now and then does not matter to a share. Processes of a distributed run count apart.

    Args:
        dataset: The data set to wrap.
        max_bad_fraction: Share of bad reads among all reads above which reading stops; 0 stops at
            the first bad one.
        min_bad: Bad reads below which the share is not judged yet: the first of all reads being
            bad is no share of 100 %.
    """

    def __init__(
        self, dataset: ImageDataset, *, max_bad_fraction: float = 0.01, min_bad: int = 10
    ) -> None:
        if not 0 <= max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction must be in [0, 1], not {max_bad_fraction}")
        if min_bad < 1:
            raise ValueError(f"min_bad must be at least 1, not {min_bad}")
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
        """Bad reads so far, those of all workers included."""
        return int(self._counts[_BAD])

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """Returns the sample at `index`, or at the next index that can be read.

        Raises:
            DataError: Too large a share of the images is corrupt, or all of them are.
        """
        for candidate in itertools.chain(range(index, len(self)), range(index)):
            self._counts[_SEEN] += 1
            try:
                return self.dataset[candidate]
            except CorruptImageError as error:
                self._note(candidate, error)
        raise DataError(f"none of the {len(self)} images can be read")

    def _note(self, index: int, error: CorruptImageError) -> None:
        self._counts[_BAD] += 1
        seen, bad = self._counts.tolist()
        if index not in self._logged:
            self._logged.add(index)
            logger.warning("%s: replaced by another image (%d replaced so far)", error, bad)
        if bad >= self.min_bad and bad > self.max_bad_fraction * seen:
            raise DataError(
                f"{bad} of {seen} images read are corrupt, more than the allowed share of "
                f"{self.max_bad_fraction:g} (max_bad_fraction); the last: {error}"
            ) from error
