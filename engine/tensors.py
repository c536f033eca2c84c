"""Tensors in nested containers, such as batches of data loaders and outputs of models."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

__all__ = ["copy_from_host", "copy_to", "is_finite", "iter_tensors", "map_tensors", "unwrap"]


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], tree: Any) -> Any:
    """Apply a function to every tensor in mappings, lists, tuples and named tuples.

    Returns:
        New containers of the same types, except that mappings become dicts. Other objects are the
        same.
    """
    if isinstance(tree, torch.Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        return {key: map_tensors(function, value) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_tensors(function, value) for value in tree))
    if isinstance(tree, (list, tuple)):
        return type(tree)(map_tensors(function, value) for value in tree)
    return tree


def iter_tensors(tree: Any) -> Iterator[torch.Tensor]:
    """Yield every tensor that `map_tensors` finds."""
    found: list[torch.Tensor] = []
    map_tensors(lambda tensor: found.append(tensor) or tensor, tree)
    yield from found


def copy_to(tree: Any, device: torch.device) -> Any:
    """Copy every tensor to a device, even if it is there already.

    The copy may then be changed in place, for example by mixup, while the original is unchanged.
    """
    return map_tensors(lambda tensor: tensor.to(device, non_blocking=True, copy=True), tree)


def copy_from_host(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor of the CPU to a device, without waiting for the device."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def is_finite(tree: Any) -> bool:
    """Return whether all floating-point numbers are finite; this waits for the device."""
    return all(
        bool(tensor.isfinite().all())
        for tensor in iter_tensors(tree)
        if tensor.is_floating_point() or tensor.is_complex()
    )


def unwrap(model: torch.nn.Module) -> torch.nn.Module:
    """Return the model inside DistributedDataParallel and torch.compile.

    The names in its state dict have no prefix.
    """
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model
