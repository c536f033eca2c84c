"""Averages of metrics that stay on the device until they are printed; speed and memory of a run.

`TimedBatches` measures how long training waits for its data, `TimeLeft` estimates its end.
"""

import resource
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from engine.distributed import all_reduce_sum
from engine.workers import awaited_batch

__all__ = ["Meters", "Throughput", "TimeLeft", "TimedBatches", "peak_memory_mb"]


class Meters:
    """Weighted averages of named scalars, summed in float64 on the device.

    An update only queues a few kernels. `averages` waits for the device and fetches the sums.

    Args:
        device: Device of the sums.
        names: Names of the scalars, in any order. By default the first update sets them. They are
            needed if a process may have no update but must still take part in the reduction, as in
            an evaluation with fewer batches than processes.
    """

    def __init__(self, device: torch.device, names: Sequence[str] = ()) -> None:
        self._device = device
        self._reset(names)

    def _reset(self, names: Iterable[str]) -> None:
        """Set the names, and the sums to zero."""
        self._names = list(names)
        size = len(self._names) + 1  # The last element is the number of items.
        self._sums = torch.zeros(size, dtype=torch.float64, device=self._device)
        self._sums_before = [0.0] * size

    def update(self, values: Mapping[str, torch.Tensor], n: int = 1) -> None:
        """Add averages over `n` items.

        Args:
            values: Tensors with one element each; they are detached.
            n: Number of items, such as the images in the batch.

        Raises:
            ValueError: The names differ from those of earlier updates.
        """
        self._add(values, n, scale=n)

    def add_sums(self, sums: Mapping[str, torch.Tensor], n: int) -> None:
        """Add sums over `n` items, such as the number of correct answers. Counts stay exact.

        Args:
            sums: Tensors with one element each; they are detached.
            n: Number of items.

        Raises:
            ValueError: The names differ from those of earlier updates.
        """
        self._add(sums, n, scale=1)

    def _add(self, values: Mapping[str, torch.Tensor], n: int, scale: int) -> None:
        """Add `scale` times the values to the sums."""
        if not self._names:
            self._reset(values)
        if set(self._names) != set(values):
            raise ValueError(f"the names of values must be {self._names}, got {list(values)}")
        scalars = [values[name].detach().reshape(()) for name in self._names]
        scalars = [scalar.to(self._device, non_blocking=True) for scalar in scalars]
        self._sums[:-1] += torch.stack(scalars).double() * scale
        self._sums[-1] += n

    def averages(self, *, all_processes: bool = False, recent: bool = False) -> dict[str, float]:
        """Return the averages in the order of the names; empty before the first update.

        Args:
            all_processes: Average over all processes; all of them must call this.
            recent: Average only the updates since the last call with `recent`.
        """
        sums = all_reduce_sum(self._sums.clone()) if all_processes else self._sums
        totals = sums.tolist()
        before = self._sums_before if recent else [0.0] * len(totals)
        if recent:
            self._sums_before = totals
        *gains, n = (total - old for total, old in zip(totals, before, strict=True))
        return {name: gain / n for name, gain in zip(self._names, gains, strict=True)} if n else {}


class Throughput:
    """Images per second of wall-clock time."""

    def __init__(self) -> None:
        self._start = self._last_call = time.perf_counter()
        self._images = self._recent = 0

    def add(self, images: int) -> None:
        """Add a number of processed images."""
        self._images += images
        self._recent += images

    def recent(self) -> float:
        """Return images per second since the last call of `recent`, or since the start."""
        now = time.perf_counter()
        images_per_s = self._recent / max(now - self._last_call, 1e-9)
        self._last_call, self._recent = now, 0
        return images_per_s

    def average(self) -> float:
        """Return images per second since the start."""
        return self._images / max(time.perf_counter() - self._start, 1e-9)


class TimedBatches(Iterator[Any]):
    """An iterator over batches that measures how long its caller waits for them.

    Args:
        loader: The batches. The start of its workers counts as waiting.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        start = time.perf_counter()
        self._batches = iter(loader)
        self._seconds = time.perf_counter() - start
        self._before = 0.0

    def __next__(self) -> Any:
        """Return the next batch."""
        start = time.perf_counter()
        try:
            with awaited_batch():
                return next(self._batches)
        finally:
            self._seconds += time.perf_counter() - start

    def recent(self) -> float:
        """Return the seconds of waiting since the last call of `recent`, or since the start."""
        seconds, self._before = self._seconds - self._before, self._seconds
        return seconds

    def total(self) -> float:
        """Return the seconds of waiting since the start."""
        return self._seconds


class TimeLeft:
    """Time that is left, estimated from the average time of a step so far.

    Args:
        total: Number of steps at the end.
        done: Number of steps done now, at the start of the measurement.
    """

    def __init__(self, total: int, done: int = 0) -> None:
        self._total, self._first = total, done
        self._start = time.perf_counter()

    def seconds(self, done: int) -> float:
        """Return the seconds left after `done` steps; everything between the steps counts too."""
        elapsed = time.perf_counter() - self._start
        return elapsed / max(done - self._first, 1) * (self._total - done)


def peak_memory_mb(device: torch.device) -> float:
    """Return the peak memory so far, in MiB: torch's on a GPU, that of the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
