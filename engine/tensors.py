"""Tensors in nested containers, as data loaders and models give them."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], tree: Any) -> Any:
    """Applies a function to every tensor in mappings, lists, tuples and named tuples.

    The containers are rebuilt; mappings become dicts. Anything else is passed on as it is.
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
    """Yields every tensor that `map_tensors` would reach."""
    found: list[torch.Tensor] = []
    map_tensors(lambda tensor: found.append(tensor) or tensor, tree)
    yield from found


def copy_to(tree: Any, device: torch.device) -> Any:
    """Copies every tensor to a device, also one that is there already.

    So whoever gets the copy may change it in place, as mixup does, and the original can be shown or
    used again.
    """
    return map_tensors(lambda tensor: tensor.to(device, non_blocking=True, copy=True), tree)


def is_finite(tree: Any) -> bool:
    """Whether all floating-point numbers in the tree are finite; fetches from the device."""
    return all(
        bool(tensor.isfinite().all())
        for tensor in iter_tensors(tree)
        if tensor.is_floating_point() or tensor.is_complex()
    )


def unwrap(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside DistributedDataParallel and torch.compile, whose names carry no prefix."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model
