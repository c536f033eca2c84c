"""Clock and statistics that the benchmarks share."""

import statistics
import time
from collections.abc import Sequence

import torch

__all__ = ["clock", "median_ratio"]


def clock(device: torch.device) -> float:
    """Return the time in seconds, after all work queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def median_ratio(times: Sequence[float], base: Sequence[float]) -> float:
    """Return the median over the rounds of `times[i] / base[i]`."""
    return statistics.median(t / b for t, b in zip(times, base, strict=True))
