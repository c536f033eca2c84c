"""The code of the workers in `test_zips`, in a module that a spawned worker imports quickly."""

import pickle
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np


def read_all(archive: Any, seed: int, rounds: int) -> dict[str, bytes]:
    """Read every member of an archive in each round, in an order that depends on the seed."""
    names = list(archive.names)
    for _ in range(rounds):
        np.random.RandomState(seed).shuffle(names)
        content = {name: archive.read(name) for name in names}
    return content


def answer(pickled: bytes, seed: int, barrier: Any, answers: Any) -> None:
    """Run a spawned worker: unpickle the archive, wait for the other workers, read all members."""
    # The package imports torch, which takes seconds in a new interpreter. The archives do not need
    # it, so an empty package replaces `datasets`.
    package = types.ModuleType("datasets")
    package.__path__ = [str(Path(__file__).parents[2] / "datasets")]
    sys.modules.setdefault("datasets", package)
    answer_forked(pickle.loads(pickled), seed, barrier, answers)


def answer_forked(archive: Any, seed: int, barrier: Any, answers: Any) -> None:
    """Run a forked worker: wait for the other workers, then read all members."""
    barrier.wait(120)
    answers.put(read_all(archive, seed, rounds=40))
