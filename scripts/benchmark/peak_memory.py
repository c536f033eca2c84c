"""Peak memory of a function."""

from collections.abc import Callable

import torch

__all__ = ["peak_memory"]


def peak_memory(work: Callable[[], object], device: torch.device | str) -> int:
    """Return the peak of allocated bytes during `work()`, above those allocated before it.

    On a GPU torch's allocator counts. On a CPU torch's profiler records every allocation and
    release, also inside compiled operators and in other threads.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        work()
    events = profile.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes):
        held += change
        peak = max(peak, held)
    return peak
