"""Clock, statistics and an argument type that the benchmarks share."""

import argparse
import statistics
import time
from collections.abc import Sequence

import torch

__all__ = ["clock", "median_ratio", "positive_int"]


def clock(device: torch.device) -> float:
    """Return the time in seconds, after all work queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def median_ratio(times: Sequence[float], base: Sequence[float]) -> float:
    """Return the median over the rounds of `times[i] / base[i]`."""
    return statistics.median(t / b for t, b in zip(times, base, strict=True))


def positive_int(text: str) -> int:
    """Convert an argument of a command to a whole number >= 1.

    Raises:
        argparse.ArgumentTypeError: The text is no such number.
    """
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number >= 1, got {text!r}")
    return number
