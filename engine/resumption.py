"""The check of a checkpoint before a training resumes from it.

torch and timm copy states into their objects without a check: a scheduler, for example, replaces
any attribute. So every entry is compared with the object that it replaces, before anything is
changed. `engine.optimizer_state` does this for the optimizer.
"""

import math
import reprlib
from collections.abc import Mapping
from typing import Any

import torch

from engine.errors import UserError
from engine.foreign import is_number, is_real, is_whole, require_that, same_kind

__all__ = ["check_classes", "check_position", "check_scaler", "check_scheduler"]

_LARGEST_EPOCH = 2**31
# Divisors in the schedules of torch and timm.
_DIVISORS = {"step_size", "decay_t", "t_initial"}


def check_position(checkpoint: Mapping[str, Any], steps: int, total_batch_size: int) -> None:
    """Check epoch, step, best metric, evaluations since then, and total batch size.

    Args:
        checkpoint: The checkpoint.
        steps: Number of optimizer steps per epoch.
        total_batch_size: Number of images per optimizer step over all processes.

    Raises:
        UserError: An entry is wrong or does not fit this training.
    """
    epoch, step = checkpoint["epoch"], checkpoint.get("step", 0)
    require_that(is_whole(epoch) and -1 <= epoch < _LARGEST_EPOCH, "epoch", "a number >= -1", epoch)
    require_that(is_whole(step) and step >= 0, "step", "a whole number >= 0", step)
    best = checkpoint.get("best", 0.0)
    require_that(is_number(best) and not math.isnan(best), "best", "a number", best)
    since = checkpoint.get("evals_since_best", 0)
    valid = is_whole(since) and 0 <= since < _LARGEST_EPOCH
    require_that(valid, "evals_since_best", "a whole number >= 0", since)
    before = checkpoint.get("images_per_step", total_batch_size)
    require_that(is_whole(before) and before > 0, "images_per_step", "a whole number > 0", before)
    trained = checkpoint.get("trained", {})
    are_metrics = isinstance(trained, Mapping) and all(
        isinstance(name, str) and is_number(value) for name, value in trained.items()
    )
    require_that(are_metrics, "trained", "a dict of numbers", trained)
    if step and before != total_batch_size:
        raise UserError(
            f"the total batch size must be {before}, as in the checkpoint, which is from the "
            f"middle of an epoch, got {total_batch_size}; resume with the same batch size "
            "and number of processes"
        )
    require_that(step <= steps, "step", f"at most {steps}, the optimizer steps of an epoch", step)


def check_classes(checkpoint: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Check that labels mean the same in a checkpoint and in this training.

    Args:
        checkpoint: A checkpoint with or without `task`, `classes` and `label_to_category`.
        own: The entries that this training writes to its checkpoints.

    Raises:
        UserError: Both have the entry, and it differs.
    """
    for name in ("task", "classes", "label_to_category"):
        saved, wanted = checkpoint.get(name), own.get(name)
        if saved is None or wanted is None:
            continue
        saved = list(saved) if isinstance(saved, tuple) else saved
        if type(saved) is type(wanted) and saved == wanted:
            continue
        raise UserError(
            f"{name} must be that of the checkpoint, {_difference(saved, wanted)}: train on the "
            "data of the checkpoint, or start a new run from its weights with --finetune"
        )


def check_scheduler(saved: Any, scheduler: Any) -> None:
    """Check the state of a schedule.

    Args:
        saved: The entry `lr_scheduler` of the checkpoint.
        scheduler: The scheduler of torch or timm that will load it.

    Raises:
        UserError: It is not the state of this schedule.
    """
    require_that(isinstance(saved, Mapping), "lr_scheduler", "a dict", saved)
    own = scheduler.state_dict()
    for name, value in saved.items():
        key = f"lr_scheduler.{name}"
        if name in own:
            same_kind(key, value, own[name])
            if name in _DIVISORS and is_number(value):
                require_that(value > 0, key, "> 0", value)
        else:
            # Loading sets attributes by name, so a name must not be that of a method.
            is_free = isinstance(name, str) and not hasattr(type(scheduler), name)
            plain = value is None or isinstance(value, str) or is_real(value)
            require_that(is_free and plain, key, "absent", value)
    public = {name for name, value in own.items() if value is not None and name[:1] != "_"}
    missing = sorted(public - saved.keys()) if "last_epoch" in own else []
    require_that(not missing, "lr_scheduler", f"a dict with {', '.join(missing)}", list(saved))


def check_scaler(saved: Any, scaler: torch.amp.GradScaler) -> None:
    """Check the state of a gradient scaler; an empty one is that of a training without scaling.

    Args:
        saved: The entry `scaler` of the checkpoint; None if there is none.
        scaler: The scaler that will load it.

    Raises:
        UserError: It is not the state of a scaler.
    """
    require_that(saved is None or isinstance(saved, Mapping), "scaler", "a dict", saved)
    if not saved or not scaler.is_enabled():
        return
    for name, own in scaler.state_dict().items():
        key, value = f"scaler.{name}", saved.get(name)
        same_kind(key, value, own)
        require_that(value > 0 or (value == 0 and name == "_growth_tracker"), key, "> 0", value)
        require_that(is_whole(value) or not is_whole(own), key, "a whole number", value)


def _difference(saved: Any, own: Any) -> str:
    """Show the first difference of two lists or mappings of labels."""
    kinds = isinstance(saved, (list, dict)) and type(saved) is type(own)
    if not kinds:
        return f"{reprlib.repr(saved)}, got {reprlib.repr(own)}"
    if len(saved) != len(own):
        return f"which has {len(saved)} entries, got {len(own)}"
    pairs = [dict(enumerate(one)) if isinstance(one, list) else one for one in (saved, own)]
    label = next((key for key in pairs[1] if pairs[0].get(key) != pairs[1][key]), None)
    first, second = (reprlib.repr(one.get(label)) for one in pairs)
    return f"which has {first} for label {label}, got {second}"
