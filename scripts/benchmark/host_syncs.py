"""Count the operators of a piece of training, and how often the host waits for the device.

Each operator costs time on the host. A wait empties the queue of the GPU, which is then idle until
the host has launched the next kernels. Both are counted without a GPU: on a CPU, every tensor
counts as one of the device.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["HostWork", "OperatorCounter"]

# The host waits for the values or for the number of elements of the result.
_WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "bincount", "equal"}
_WAITING |= {"_unique2", "unique_dim", "unique_consecutive"}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


@dataclass(frozen=True)
class HostWork:
    """Numbers of operators and waits."""

    operators: int
    """Operators, views included. The operators of the backward pass count, too."""
    syncs: int
    """Waits of the host for the device."""

    def __sub__(self, other: "HostWork") -> "HostWork":
        return HostWork(self.operators - other.operators, self.syncs - other.syncs)


class OperatorCounter(TorchDispatchMode):
    """Context manager that counts operators and host syncs.

    A sync is `item`, an index of bools, an operator with a result of unknown size, or a copy
    between host and device that is not `non_blocking`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators = 0
        self.syncs: Counter[str] = Counter()
        self._copies = _CopyCounter(self.syncs)

    def done(self) -> HostWork:
        """Return the numbers since the start."""
        return HostWork(self.operators, self.syncs.total())

    def __enter__(self) -> "OperatorCounter":
        self._copies.__enter__()
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._copies.__exit__(*exception)

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        self.operators += 1
        name = operator.overloadpacket.__name__
        by_bools = name in _INDEXING and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in _WAITING or by_bools:
            self.syncs[name] += 1
        return operator(*args, **(kwargs or {}))


class _CopyCounter(TorchFunctionMode):
    """Context manager that counts copies between host and device, which do nothing on a CPU."""

    def __init__(self, syncs: Counter[str]) -> None:
        super().__init__()
        self._syncs = syncs

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if _is_copy(function, args, kwargs) and not kwargs.get("non_blocking"):
            self._syncs[function.__name__] += 1
        return function(*args, **kwargs)


def _is_copy(function: Callable, args: tuple, kwargs: dict) -> bool:
    """Return whether a call copies between host and device if the device is a GPU."""
    if function in (torch.tensor, torch.as_tensor):
        return kwargs.get("device") is not None
    if function is Tensor.to:
        return "device" in kwargs or any(isinstance(arg, (torch.device, str)) for arg in args[1:2])
    if function is Tensor.tolist:
        return args[0].ndim > 0  # That of a scalar is an operator.
    return function in (Tensor.cpu, Tensor.cuda, Tensor.new_tensor)
