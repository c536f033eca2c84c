"""Seeds: every random number is a function of where the run stands, not of what ran before.

All randomness of a training step follows from (seed, epoch, step, rank), all randomness of a sample
from (seed, epoch, position). So no generator's state is ever saved, and a run that is resumed at
any step draws the very numbers that the unbroken run would have drawn.
"""

import hashlib
import random

import numpy as np
import torch


def derive_seed(*parts: int) -> int:
    """Hashes integers to a seed: `derive_seed(seed, epoch, step, rank)`.

    Different tuples give unrelated seeds, also where they differ only in order or length. The
    result depends on nothing else: not on the machine, the process or the Python version.

    Args:
        parts: any number of integers of any size and sign.

    Returns:
        An integer in [0, 2**63).
    """
    text = ",".join(str(int(part)) for part in parts)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_all(seed: int) -> None:
    """Seeds the global generators of python, numpy and torch (every device).

    Args:
        seed: an integer in [0, 2**63); numpy gets its lower 32 bits.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
