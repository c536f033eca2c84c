"""Reading checkpoints: ours, those of the original DeiT-iRPE and DETR-iRPE, and plain weights.

A checkpoint is a dict whose `model` entry is a state dict. The originals also hold an
`argparse.Namespace` under `args`; that one class is allowed, and nothing else is unpickled
(`torch.load(weights_only=True)`), so a file from a stranger cannot run code. Weights alone may also
be a bare state dict, in torch's format or as safetensors.
"""

import argparse
import logging
import pickle
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from irpe_core.config import RPEConfig
from irpe_core.download import download
from irpe_core.errors import CheckpointError
from irpe_core.mismatch import TABLE, describe_mismatch

__all__ = ["CheckpointError", "load_checkpoint", "load_weights"]

logger = logging.getLogger(__name__)

# What DistributedDataParallel and torch.compile put before every name.
_WRAPPERS = ("module.", "_orig_mod.")


def load_checkpoint(source: str | Path) -> dict:
    """Read a checkpoint onto the CPU.

    Args:
        source: A path, or an `http(s)://` address, which is kept in the torch hub cache. A name
            that ends in `.safetensors` is read as such.

    Returns:
        The checkpoint; a bare state dict comes back as `{"model": state_dict}`, names without what
        DistributedDataParallel or torch.compile put before all of them, and an
        `argparse.Namespace` under `args` as a dict. `model`, and `model_ema` unless it is None,
        hold tensors under strings and nothing else.

    Raises:
        CheckpointError: Missing, truncated, not a checkpoint, with code in it, with something else
            than tensors among its weights, or not to be had from its address.
    """
    remote = str(source).startswith(("http://", "https://"))
    path = download(str(source)) if remote else Path(source)
    if not path.is_file():
        state = "is not a file" if path.exists() else "does not exist"
        raise CheckpointError(f"checkpoint {str(path)!r} {state}")
    try:
        read = _read_safetensors if path.suffix == ".safetensors" else _read_torch
        return _normalise(read(path), path)
    except PermissionError as error:
        raise CheckpointError(f"checkpoint {str(path)!r} cannot be read: {error}") from error


def _read_torch(path: Path) -> object:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    # A damaged file makes the unpickler fail in any way it likes, IndexError included.
    except Exception as error:
        foreign = re.search(r"unsupported global:? (?:global )?(\S+)", str(error), re.IGNORECASE)
        if foreign and isinstance(error, pickle.UnpicklingError):
            raise CheckpointError(
                f"checkpoint {str(path)!r} holds objects other than tensors and plain values "
                f"({foreign[1]}), which could run code and are not loaded"
            ) from error
        raise CheckpointError(f"{str(path)!r} is truncated or not a torch checkpoint") from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
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


def _normalise(checkpoint: object, path: Path) -> dict:
    entries = checkpoint if isinstance(checkpoint, dict) else {}
    if entries and all(isinstance(value, Tensor) for value in entries.values()):
        checkpoint = {"model": entries}
    elif not isinstance(entries.get("model"), dict):
        raise CheckpointError(
            f"{str(path)!r} holds no weights: a dict with an entry 'model' is needed"
        )
    for name in ("model", "model_ema"):
        if checkpoint.get(name) is not None:
            _check_weights(checkpoint[name], f"{name!r} of {str(path)!r}")
            checkpoint[name] = _unwrapped(checkpoint[name])
    args = checkpoint.get("args")
    if isinstance(args, argparse.Namespace):
        checkpoint["args"] = vars(args)
    elif args is not None and not isinstance(args, dict):
        raise CheckpointError(
            f"'args' of {str(path)!r} is a {type(args).__name__}: a dict or an argparse.Namespace "
            "is needed"
        )
    return checkpoint


def _check_weights(weights: object, place: str) -> None:
    """Weights are tensors under names, so that nobody who reads them has to ask."""
    if not isinstance(weights, dict):
        raise CheckpointError(
            f"{place} holds no weights but a {type(weights).__name__}: a dict of tensors is needed"
        )
    for key, value in weights.items():
        if not isinstance(key, str):
            raise CheckpointError(f"{place} has {key!r} among its names: strings are needed")
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"{place} has a {type(value).__name__} under {key!r}: a tensor is needed"
            )


def _unwrapped(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _WRAPPERS:
        if weights and all(key.startswith(prefix) for key in weights):
            return _unwrapped({key[len(prefix) :]: value for key, value in weights.items()})
    return weights


def load_weights(
    model: nn.Module, state_dict: dict[str, Tensor], *, may_lack_tables: bool = False
) -> None:
    """Load a state dict strictly; the model is untouched when it does not fit.

    Args:
        model: What takes the weights.
        state_dict: The weights.
        may_lack_tables: Also take weights of the same model without iRPE: if all tables are
            missing and nothing else is, they keep their values, and that is logged.

    Raises:
        CheckpointError: Counts and names the missing, unexpected and wrongly shaped keys, and says
            what the likely cause is.
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
    model.load_state_dict(state_dict)
    if tables:
        logger.info(
            "the checkpoint has no iRPE: the %d tables keep their initial values", len(tables)
        )


def _shape(value: object) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, Tensor) else None
