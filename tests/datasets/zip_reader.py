"""What a worker of `test_zips` runs; apart, since a spawned interpreter imports its module anew."""

import pickle
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np


def read_all(archive: Any, seed: int, rounds: int) -> dict[str, bytes]:
    """Reads every member of an archive, in an order of one's own."""
    names = list(archive.names)
    for _ in range(rounds):
        np.random.RandomState(seed).shuffle(names)
        content = {name: archive.read(name) for name in names}
    return content


def answer(pickled: bytes, seed: int, barrier: Any, answers: Any) -> None:
    """A spawned worker: gets the archive, waits for the others, then reads everything."""
    # The package imports torch, which takes a new interpreter seconds; its archives do without.
    package = types.ModuleType("datasets")
    package.__path__ = [str(Path(__file__).parents[2] / "datasets")]
    sys.modules.setdefault("datasets", package)
    answer_forked(pickle.loads(pickled), seed, barrier, answers)


def answer_forked(archive: Any, seed: int, barrier: Any, answers: Any) -> None:
    """A forked worker: has the archive, waits for the others, then reads everything."""
    barrier.wait(120)
    answers.put(read_all(archive, seed, rounds=40))
