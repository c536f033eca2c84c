"""Figures of a run: averages that stay on the device until they are printed, speed and memory."""

import resource
import sys
import time
from collections.abc import Iterable, Mapping, Sequence

import torch

from engine.distributed import all_reduce_sum


class Meters:
    """Weighted averages of named scalars, summed in float64 on the device they come from.

    An update launches a few kernels and waits for none; only `averages` fetches.

    Args:
        device: where to sum.
        names: the names to come, in any order. Without them the first update decides, so give them
            where a process might see no update at all and yet has to take part in the reduction,
            as in an evaluation of fewer batches than processes.
    """

    def __init__(self, device: torch.device, names: Sequence[str] = ()) -> None:
        self._device = device
        self._start(names)

    def _start(self, names: Iterable[str]) -> None:
        self._names = list(names)
        size = len(self._names) + 1  # the last one counts the items
        self._sums = torch.zeros(size, dtype=torch.float64, device=self._device)
        self._seen = [0.0] * size

    def update(self, values: Mapping[str, torch.Tensor], n: int = 1) -> None:
        """Adds averages over `n` items.

        Args:
            values: tensors with one element each; they are detached.
            n: the weight, such as the number of images in the batch.

        Raises:
            ValueError: the names differ from those before.
        """
        self._add(values, n, scale=n)

    def add_sums(self, sums: Mapping[str, torch.Tensor], n: int) -> None:
        """Adds sums over `n` items, which counts stay exact in: correct answers, for example.

        Args:
            sums: tensors with one element each; they are detached.
            n: the number of items they sum.

        Raises:
            ValueError: the names differ from those before.
        """
        self._add(sums, n, scale=1)

    def _add(self, values: Mapping[str, torch.Tensor], n: int, scale: int) -> None:
        if not self._names:
            self._start(values)
        if set(self._names) != set(values):
            raise ValueError(f"values have the names {list(values)} but should have {self._names}")
        scalars = [values[name].detach().reshape(()).to(self._device) for name in self._names]
        self._sums[:-1] += torch.stack(scalars).double() * scale
        self._sums[-1] += n

    def averages(self, *, all_processes: bool = False, recent: bool = False) -> dict[str, float]:
        """Fetches the averages, in the order of the names; empty before any update.

        Args:
            all_processes: whether to average over all processes, which then all have to call.
            recent: whether to average only what came since the last call with `recent`.
        """
        sums = all_reduce_sum(self._sums.clone()) if all_processes else self._sums
        totals = sums.tolist()
        start = self._seen if recent else [0.0] * len(totals)
        if recent:
            self._seen = totals
        *gained, n = (total - old for total, old in zip(totals, start, strict=True))
        return {name: gain / n for name, gain in zip(self._names, gained, strict=True)} if n else {}


class Throughput:
    """Images per second of wall time: since the last reading, and since the start."""

    def __init__(self) -> None:
        self._start = self._mark = time.perf_counter()
        self._images = self._recent = 0

    def add(self, images: int) -> None:
        """Counts images that are done."""
        self._images += images
        self._recent += images

    def recent(self) -> float:
        """Images per second since the last call of `recent`, or since the start."""
        now = time.perf_counter()
        rate = self._recent / max(now - self._mark, 1e-9)
        self._mark, self._recent = now, 0
        return rate

    def average(self) -> float:
        """Images per second since the start."""
        return self._images / max(time.perf_counter() - self._start, 1e-9)


def peak_memory_mb(device: torch.device) -> float:
    """Most memory held so far: torch's on a GPU, the whole process's on the CPU; in 2**20 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
