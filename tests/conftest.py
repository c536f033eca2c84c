"""Settings and fixtures of the whole suite."""

import logging
from collections.abc import Iterator

import pytest
import torch

# Many small tensors: more threads only wait for each other, and figures stay the same everywhere.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Random inputs are the same in every run, whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill fresh memory with NaN (integers with their maximum), so that unwritten outputs show."""
    before = torch.are_deterministic_algorithms_enabled()
    fill_before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill_before
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def own_logging() -> None:
    """Undo what a command run by an earlier test or fixture did to the root logger."""
    root = logging.getLogger()
    root.setLevel(logging.WARNING)
    for handler in [handler for handler in root.handlers if hasattr(handler, "set_by_engine")]:
        root.removeHandler(handler)
        handler.close()
