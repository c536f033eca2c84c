"""The check of an optimizer's state before it is loaded.

A fused optimizer reads and writes memory by the shape of the parameter, and not by that of its
state. So the state is compared with the parameters first.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from engine.foreign import (
    is_finite,
    is_number,
    is_numbers,
    is_real,
    is_whole,
    require_that,
    same_count,
    same_kind,
)

__all__ = ["check_optimizer"]

# Hyperparameters of all optimizers that are 0 or larger, and shares below 1.
_NOT_NEGATIVE = {"lr", "initial_lr", "eps", "weight_decay", "momentum"}
_SHARES = {"betas", "beta1", "beta2"}
# Another value of these needs other parameters or gradients than those of this training.
_FIXED_FLAGS = {"capturable", "differentiable", "maximize"}
# Flags that select a kernel; none leaves the choice to torch.
_KERNELS = {"fused", "foreach"}
# State of the parameter's shape; it may not be a single number.
_MOMENTS = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer"}


def check_optimizer(saved: Any, optimizer: torch.optim.Optimizer) -> None:
    """Check hyperparameters and state of an optimizer.

    Args:
        saved: The entry `optimizer` of the checkpoint.
        optimizer: The optimizer that will load it.

    Raises:
        UserError: It is not the state of this optimizer.
    """
    parts = isinstance(saved, Mapping) and saved.keys() >= {"state", "param_groups"}
    require_that(parts, "optimizer", "a dict with state and param_groups", saved)
    groups, own_groups = saved["param_groups"], optimizer.state_dict()["param_groups"]
    is_list = isinstance(groups, list) and all(isinstance(group, Mapping) for group in groups)
    require_that(is_list, "optimizer.param_groups", "a list of dicts", groups)
    same_count("optimizer.param_groups", groups, own_groups)
    numbers: list[int] = []
    owners: list[tuple[Tensor, Mapping[str, Any]]] = []
    for i, (group, own) in enumerate(zip(groups, own_groups, strict=True)):
        place = f"optimizer.param_groups[{i}]"
        members = group.get("params")
        valid = isinstance(members, list) and all(map(is_whole, members))
        require_that(valid, f"{place}.params", "a list of whole numbers", members)
        same_count(f"{place}.params", members, own["params"])
        _check_group(place, group, own)
        numbers += members
        owners += [(p, group) for p in optimizer.param_groups[i]["params"]]
    require_that(len(set(numbers)) == len(numbers), "optimizer.param_groups", "disjoint", numbers)
    state = saved["state"]
    known = isinstance(state, Mapping) and set(state) <= set(numbers)
    require_that(known, "optimizer.state", "a dict with an entry per parameter", state)
    by_number = dict(zip(numbers, owners, strict=True))
    for number, values in state.items():
        _check_state(f"optimizer.state[{number}]", values, optimizer, *by_number[number])


def _check_group(place: str, group: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Check the hyperparameters of a parameter group, except `params`."""
    for name, value in group.items():
        key = f"{place}.{name}"
        if name == "params":
            continue
        if name == "param_names":
            require_that(
                isinstance(value, list) and all(isinstance(one, str) for one in value),
                key,
                "a list of strings",
                value,
            )
        elif name in own:
            same_kind(key, value, False if name in _KERNELS else own[name])
        else:
            # Entries of another version, or those that timm adds in the first step.
            require_that(value is None or is_real(value), key, "a finite number", value)
        if name in _NOT_NEGATIVE:
            require_that(_all(lambda one: one >= 0, value), key, ">= 0", value)
        elif name in _SHARES:
            require_that(_all(lambda one: 0 <= one < 1, value), key, "in [0, 1)", value)
        elif name in _FIXED_FLAGS and own.get(name) is not None:
            require_that(bool(value) == own[name], key, own[name], value)
    needed = {name for name, value in own.items() if is_number(value) or is_numbers(value)}
    missing = sorted(needed - {"initial_lr", "lr_scale"} - group.keys())
    require_that(not missing, place, f"a dict with {', '.join(missing)}", list(group))
    both = bool(group.get("fused")) and bool(group.get("foreach"))
    require_that(not both, f"{place}.foreach", "false for a fused optimizer", group.get("foreach"))


def _check_state(
    place: str,
    values: Any,
    optimizer: torch.optim.Optimizer,
    parameter: Tensor,
    group: Mapping[str, Any],
) -> None:
    """Check the state of one parameter, whose group in the checkpoint is `group`."""
    require_that(isinstance(values, Mapping), place, "a dict", values)
    if values and isinstance(optimizer, torch.optim.Adam):
        wanted = {"step", "exp_avg", "exp_avg_sq"}
        wanted |= {"max_exp_avg_sq"} if group.get("amsgrad") else set()
        require_that(values.keys() >= wanted, place, f"a dict with {sorted(wanted)}", list(values))
    library = type(optimizer).__module__.split(".")[0]
    for name, value in values.items():
        key = f"{place}.{name}"
        tensors = value if isinstance(value, list) else [value]
        for one in tensors:
            if isinstance(one, Tensor):
                require_that(is_finite(one), key, "a finite tensor", "another")
            else:
                require_that(one is None or is_real(one), key, "a number or a tensor", one)
        if name == "step":
            is_count = is_real(value) and float(value) >= 0
            require_that(is_count, key, "a number >= 0", value)
        if isinstance(value, Tensor) and library in ("torch", "timm"):
            _check_shape(key, value, parameter, is_exact=library == "torch")
        elif name in _MOMENTS:
            require_that(value is None or isinstance(value, Tensor), key, "a tensor", value)


def _check_shape(key: str, value: Tensor, parameter: Tensor, *, is_exact: bool) -> None:
    """Check that a tensor of the state has the form of its parameter, or is a single number.

    Args:
        key: Name of the tensor.
        value: The tensor.
        parameter: The parameter.
        is_exact: Refuse the means over some axes, which factorized optimizers keep.
    """
    if value.ndim == 0 and key.rsplit(".", 1)[-1] not in _MOMENTS:
        return
    shape, own = tuple(value.shape), tuple(parameter.shape)
    fits = shape == own if is_exact else _is_reduced(shape, own)
    require_that(fits, key, f"of shape {own}, as its parameter", shape)
    if shape == own:
        # Kernels go over state and parameter by one index, so that the order in memory counts.
        orders = [
            [stride for stride, size in zip(one.stride(), own, strict=True) if size > 1]
            for one in (value, torch.zeros_like(parameter, device="meta"))
        ]
        require_that(orders[0] == orders[1], f"strides of {key}", orders[1], orders[0])
        same = value.is_floating_point() == parameter.is_floating_point()
        require_that(same, f"dtype of {key}", parameter.dtype, value.dtype)


def _is_reduced(shape: Sequence[int], full: Sequence[int]) -> bool:
    """Return whether a shape is another one without some axes, or with 1 instead of them."""
    rest = iter(full)
    return all(any(size in (one, 1) for one in rest) for size in shape)


def _all(condition: Any, value: Any) -> bool:
    """Return whether a condition is met by a number, or by all in a list; true for others."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return all(condition(one) for one in values if is_number(one))
