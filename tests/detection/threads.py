"""Threads instead of processes: the collectives of evaluation, without starting torch again."""

import importlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

MODULES = ("detection.coco_eval", "detection.evaluation")


def as_processes(monkeypatch: pytest.MonkeyPatch, count: int, work: Callable[[int], Any]) -> list:
    """Return the results of `work(rank)` in `count` threads that act as processes."""
    here = threading.local()
    barrier = threading.Barrier(count, timeout=30)
    box: list[Any] = [None] * count

    def all_gather_object(value: Any) -> list[Any]:
        box[here.rank] = value
        barrier.wait()
        gathered = list(box)
        barrier.wait()
        return gathered

    def start(rank: int) -> Any:
        here.rank = rank
        return work(rank)

    replacements = {
        "all_gather_object": all_gather_object,
        "broadcast_object": lambda value: all_gather_object(value)[0],
        "is_main": lambda: here.rank == 0,
    }
    for module in map(importlib.import_module, MODULES):
        for name in replacements.keys() & vars(module).keys():
            monkeypatch.setattr(module, name, replacements[name])
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(start, range(count)))
