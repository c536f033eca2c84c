"""Support of tracers that cannot hold the operators of iRPE.

`torch.jit.trace` (with the counters of operations that are based on it) and `torch.onnx.export`
record standard operators of PyTorch. For them, attention is composed of such operators, sizes are
plain integers, and the bucket ids of a grid are a constant. `torch.compile` and `torch.export` hold
the operators of iRPE and need none of this.
"""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["is_recording", "not_recorded", "static_sizes"]


def is_recording() -> bool:
    """Return whether a tracer records standard operators of PyTorch."""
    # The last call alone takes longer than the others, and attention asks in every layer.
    return torch.jit.is_tracing() or (
        torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export()
    )


def static_sizes(sizes: Iterable[int]) -> tuple[int, ...]:
    """Return sizes as they are, but as integers in `torch.jit.trace`, where they are tensors."""
    if not torch.jit.is_tracing():
        return tuple(sizes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        return tuple(int(size) for size in sizes)


@contextmanager
def not_recorded() -> Iterator[None]:
    """Compute real tensors inside of the block, which are constants for the tracer."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)
    try:
        with _disable_current_modes():
            yield
    finally:
        torch._C._set_tracing_state(state)
