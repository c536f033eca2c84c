"""Settings and fixtures of the whole suite."""

import logging
import os
import sys
from collections.abc import Iterator

import pytest
import torch

from rpe_ops import implementations

if not torch.cuda.is_available():
    # Before the first import of Triton, whose kernels then run in its interpreter.
    assert "triton" not in sys.modules
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Many small tensors: more threads only wait for each other, and figures stay the same everywhere.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Random inputs are the same in every run, whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture(
    params=["reference", "cpp", pytest.param("triton", marks=pytest.mark.slow)], scope="module"
)
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every implementation that runs on the CPU in turn, in the place of "auto"."""
    if request.param == "cpp":
        from tests.rpe_ops.extension import provide_library

        provide_library()
    resolve = implementations._resolve

    def resolve_to_this(choice: str, device_type: str, operator: str) -> str:
        return resolve(request.param if choice == "auto" else choice, device_type, operator)

    resolve_to_this._dynamo_marked_constant = True
    implementations._resolve = resolve_to_this
    yield request.param
    implementations._resolve = resolve


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
