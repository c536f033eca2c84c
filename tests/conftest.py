"""Settings and fixtures of the whole suite."""

import logging
import os
import sys
from collections.abc import Iterator

import pytest
import torch

from rpe_ops import implementations

if not torch.cuda.is_available():
    # Run Triton kernels in its interpreter; this must be set before Triton is imported.
    assert "triton" not in sys.modules
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The tests must not depend on measurements, and not write to the cache of the user.
os.environ["IRPE_AUTOTUNE"] = "0"

# The tensors are small, so more threads are slower. One thread also gives the same results on
# every machine.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed_torch() -> None:
    """Seed torch before every test, so that its random inputs do not depend on other tests."""
    torch.manual_seed(0)


@pytest.fixture(
    params=["reference", "cpp", pytest.param("triton", marks=pytest.mark.slow)], scope="module"
)
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each implementation that runs on the CPU, used instead of "auto"."""
    if request.param == "cpp":
        from tests.rpe_ops.extension import provide_library

        provide_library()
    if request.param == "triton":
        import tests.rpe_ops.interpreter  # noqa: F401  (fixes products of bfloat16)
    resolve = implementations._resolve

    def resolve_to_this(choice: str, device_type: str, operator: str) -> str:
        return resolve(request.param if choice == "auto" else choice, device_type, operator)

    resolve_to_this._dynamo_marked_constant = True
    implementations._resolve = resolve_to_this
    yield request.param
    implementations._resolve = resolve


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill new memory with NaN (integers: their maximum) to detect outputs that are not written."""
    before = torch.are_deterministic_algorithms_enabled()
    fill_before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill_before
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def reset_logging() -> None:
    """Reset the root logger, which commands in earlier tests or fixtures may have changed."""
    root = logging.getLogger()
    root.setLevel(logging.WARNING)
    for handler in [handler for handler in root.handlers if hasattr(handler, "set_by_engine")]:
        root.removeHandler(handler)
        handler.close()
