"""Seeds that depend only on the position in the run.

The random numbers of a training step depend only on (seed, epoch, batch, rank), those of a sample
only on (seed, epoch, position). Therefore no state of a random generator is saved, and a run that
is resumed at any step draws the same numbers as an uninterrupted one.
"""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["derive_seed", "kept_random_state", "seed_all"]


def derive_seed(*parts: int) -> int:
    """Hash integers to a seed, as in `derive_seed(seed, epoch, batch, rank)`.

    Different tuples give unrelated seeds, even if they differ only in order or length. The result
    is the same on every machine and with every version of Python.

    Args:
        *parts: Integers of any size and sign.

    Returns:
        An integer in [0, 2**63).
    """
    text = ",".join(str(int(part)) for part in parts)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_all(seed: int) -> None:
    """Seed the global random generators of Python, NumPy and torch (on all devices).

    Args:
        seed: Integer in [0, 2**63); NumPy gets its lower 32 bits.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Restore the states of the random generators of Python, NumPy and torch at the end."""
    python, numpy = random.getstate(), np.random.get_state()
    device = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(device):
        yield
    random.setstate(python)
    np.random.set_state(numpy)
