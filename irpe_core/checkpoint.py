"""Reading checkpoints of this project, of the original DeiT-iRPE and DETR-iRPE, and bare weights.

A checkpoint is a dict with a state dict under `model`. Those of the originals also have an
`argparse.Namespace` under `args`. Files are read with `torch.load(weights_only=True)`, and this
class is the only one allowed in addition, so an untrusted file cannot run code. A file may also be
a bare state dict, in torch's format or as safetensors.
"""

import argparse
import logging
import math
import pickle
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import torch
from torch import Tensor, nn

from irpe_core.config import RPEConfig
from irpe_core.download import download
from irpe_core.entries import check_entries
from irpe_core.errors import CheckpointError
from irpe_core.integrity import check_tensors, checked_archive
from irpe_core.mismatch import TABLE, describe_mismatch

__all__ = ["CheckpointError", "load_checkpoint", "load_weights"]

logger = logging.getLogger(__name__)

# Prefixes that DistributedDataParallel and torch.compile add to all names.
_WRAPPERS = ("module.", "_orig_mod.")


def load_checkpoint(source: str | Path) -> dict:
    """Read a checkpoint onto the CPU.

    Args:
        source: A path, a `file://` URL, or an `https://` URL, which is downloaded into the torch
            hub cache. A file with the suffix `.safetensors` is read as safetensors.

    Returns:
        The checkpoint as a dict. A bare state dict becomes `{"model": state_dict}`. The prefixes
        that DistributedDataParallel and torch.compile add to all names are removed. An
        `argparse.Namespace` under `args` becomes a dict. `model`, and `model_ema` if it is not
        None, map strings to tensors.

    Raises:
        CheckpointError: The file is missing or truncated, is not a checkpoint, contains code or
            weights that are not tensors, or cannot be downloaded.
    """
    remote = str(source).startswith(("http://", "https://"))
    path = download(str(source)) if remote else Path(source)
    if str(source).startswith("file://"):
        path = Path(unquote(urlsplit(str(source)).path))
    try:
        if not path.is_file():
            state = "is not a file" if path.exists() else "does not exist"
            raise CheckpointError(f"checkpoint {str(path)!r} {state}")
        read = _read_safetensors if path.suffix == ".safetensors" else _read_torch
        return _normalize(read(path), path)
    except CheckpointError as error:
        if not remote:
            raise
        raise CheckpointError(f"{error}: delete {path} to download it again") from error
    except OSError as error:  # such as a name that is too long
        raise CheckpointError(f"checkpoint {str(path)!r} cannot be read: {error}") from error


def _read_torch(path: Path) -> object:
    """Read a file of `torch.save` without running code in it."""
    try:
        with checked_archive(path), torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (CheckpointError, PermissionError):
        raise
    # For a damaged file the unpickler may raise almost any exception, such as IndexError.
    except Exception as error:
        foreign = re.search(r"unsupported global:? (?:global )?(\S+)", str(error), re.IGNORECASE)
        if foreign and isinstance(error, pickle.UnpicklingError):
            raise CheckpointError(
                f"checkpoint {str(path)!r} holds objects other than tensors and plain values "
                f"({foreign[1]}), which could run code and are not loaded"
            ) from error
        raise CheckpointError(f"{str(path)!r} is truncated or not a torch checkpoint") from error
    check_tensors(content, path)
    return content


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read a state dict from a safetensors file."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise CheckpointError(
            f"{str(path)!r} needs the package safetensors, which cannot be imported: {error}"
        ) from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{str(path)!r} is truncated or not a safetensors file") from error


def _normalize(checkpoint: object, path: Path) -> dict:
    """Return the content of a file in the form that `load_checkpoint` promises."""
    entries = checkpoint if isinstance(checkpoint, dict) else {}
    if entries and all(isinstance(value, Tensor) for value in entries.values()):
        checkpoint = {"model": entries}
    elif not isinstance(entries.get("model"), dict):
        raise CheckpointError(
            f"{str(path)!r} holds no weights: it must be a state dict, or a dict with a state dict "
            "under 'model'"
        )
    for name in ("model", "model_ema"):
        if checkpoint.get(name) is not None:
            _check_weights(checkpoint[name], f"{name!r} of {str(path)!r}")
            checkpoint[name] = _unwrapped(checkpoint[name])
    check_entries(checkpoint, path)
    args = checkpoint.get("args")
    if isinstance(args, argparse.Namespace):
        checkpoint["args"] = vars(args)
    elif args is not None and not isinstance(args, dict):
        raise CheckpointError(
            f"'args' of {str(path)!r} must be a dict or an argparse.Namespace, "
            f"got a {type(args).__name__}"
        )
    return checkpoint


def _check_weights(weights: object, place: str) -> None:
    """Raise CheckpointError unless `weights` maps strings to tensors."""
    if not isinstance(weights, dict):
        raise CheckpointError(f"{place} must be a dict of tensors, got a {type(weights).__name__}")
    for key, value in weights.items():
        if not isinstance(key, str):
            raise CheckpointError(f"{place} must have strings as names, got {key!r}")
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"{place} must hold tensors, got a {type(value).__name__} under {key!r}"
            )


def _unwrapped(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefixes that wrappers add to all names."""
    for prefix in _WRAPPERS:
        if weights and all(key.startswith(prefix) for key in weights):
            return _unwrapped({key[len(prefix) :]: value for key, value in weights.items()})
    return weights


def load_weights(
    model: nn.Module, state_dict: dict[str, Tensor], *, may_lack_tables: bool = False
) -> None:
    """Load a state dict strictly; if it does not fit, the model stays unchanged.

    Args:
        model: The model.
        state_dict: The weights.
        may_lack_tables: Also accept weights of the same model without iRPE: if all tables are
            missing and nothing else, the tables keep their values, and a message is logged.

    Raises:
        CheckpointError: The weights do not fit, are not finite or have a dtype of another kind. The
            message counts and names the missing, unexpected and wrongly shaped keys, and gives the
            likely cause.
    """
    own = model.state_dict()
    tables = [key for key in own if TABLE.search(key)]
    if may_lack_tables and tables and not any(map(TABLE.search, state_dict)):
        state_dict = state_dict | {key: own[key] for key in tables}
    else:
        tables = []
    configs = (getattr(module, "config", None) for module in model.modules())
    methods = (config.method for config in configs if isinstance(config, RPEConfig))
    mismatch = describe_mismatch(
        {key: _shape(value) for key, value in state_dict.items()},
        {key: _shape(value) for key, value in own.items()},
        next(methods, None),
    )
    if mismatch:
        raise CheckpointError(f"the checkpoint does not fit {type(model).__name__}: {mismatch}")
    for key, value in state_dict.items():
        fault = _fault_of(value, own[key])
        if fault:
            raise CheckpointError(f"the checkpoint cannot be used: {key} {fault}")
    model.load_state_dict(state_dict)
    if tables:
        logger.info(
            "the checkpoint has no iRPE: the %d tables keep their initial values", len(tables)
        )


def _fault_of(value: Tensor, own: Tensor) -> str | None:
    """Describe why a tensor of the right shape is no weight of the model; None if it is one."""
    if value.is_complex() or value.is_floating_point() != own.is_floating_point():
        return f"has the dtype {value.dtype}, the model's is {own.dtype}"
    if value.is_floating_point() and value.element_size() == 1:
        value = value.float()  # float8 has no sum
    # A sum allocates nothing. Each entry is checked only if it overflows or is not finite.
    if not value.is_floating_point() or math.isfinite(value.sum(dtype=torch.float32).item()):
        return None
    if value.isfinite().all() or not own.isfinite().all():
        return None
    return f"has {int((~value.isfinite()).sum()):,} values that are not finite"


def _shape(value: object) -> tuple[int, ...] | None:
    """Return the shape of a tensor; None for another object."""
    return tuple(value.shape) if isinstance(value, Tensor) else None
