"""Clock, statistics and an argument type that the benchmarks share."""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch

__all__ = ["clock", "median_ratio", "positive_int", "timed"]

# About 1.5 ms of a GPU, longer than the host needs to launch the kernels of one attention.
_DELAY_CYCLES = 3_000_000


def clock(device: torch.device) -> float:
    """Return the time in seconds, after all work queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(work: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Return the seconds of `work()` on the device and those of the host that launches it.

    On a GPU, events measure the device. The device is delayed first, so that the host launches
    ahead of it and is not measured. On a CPU both are the same time.
    """
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        seconds = time.perf_counter() - start
        return seconds, seconds
    torch.cuda.synchronize(device)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    # A private function of torch, which may be missing in other versions.
    getattr(torch.cuda, "_sleep", lambda cycles: None)(_DELAY_CYCLES)
    events[0].record()
    start = time.perf_counter()
    work()
    host = time.perf_counter() - start
    events[1].record()
    events[1].synchronize()
    return events[0].elapsed_time(events[1]) / 1e3, host


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
