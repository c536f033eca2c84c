"""Reading checkpoints: ours, and those of the original DeiT-iRPE and DETR-iRPE.

A checkpoint is a dict whose `model` entry is a state dict. The originals also hold an
`argparse.Namespace` under `args`; that one class is allowed, and nothing else is unpickled
(`torch.load(weights_only=True)`), so a file from a stranger cannot run code.
"""

import argparse
import pickle
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from irpe_core.download import download
from irpe_core.errors import CheckpointError

__all__ = ["CheckpointError", "load_checkpoint", "load_weights"]


def load_checkpoint(source: str | Path) -> dict:
    """Read a checkpoint onto the CPU.

    Args:
        source: A path, or an `http(s)://` address, which is kept in the torch hub cache.

    Returns:
        The checkpoint; a bare state dict comes back as `{"model": state_dict}`, and an
        `argparse.Namespace` under `args` as a dict.

    Raises:
        CheckpointError: Missing, truncated, not a checkpoint, or with code in it.
    """
    path = (
        download(str(source)) if str(source).startswith(("http://", "https://")) else Path(source)
    )
    if not path.is_file():
        state = "is not a file" if path.exists() else "does not exist"
        raise CheckpointError(f"checkpoint {str(path)!r} {state}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise CheckpointError(f"checkpoint {str(path)!r} cannot be read: {error}") from error
    # A damaged file makes the unpickler fail in any way it likes, IndexError included.
    except Exception as error:
        foreign = re.search(r"unsupported global:? (?:global )?(\S+)", str(error), re.IGNORECASE)
        if foreign and isinstance(error, pickle.UnpicklingError):
            raise CheckpointError(
                f"checkpoint {str(path)!r} holds objects other than tensors and plain values "
                f"({foreign[1]}), which could run code and are not loaded"
            ) from error
        raise CheckpointError(f"{str(path)!r} is truncated or not a torch checkpoint") from error
    return _normalise(checkpoint, path)


def _normalise(checkpoint: object, path: Path) -> dict:
    if isinstance(checkpoint, dict) and checkpoint:
        if all(isinstance(value, Tensor) for value in checkpoint.values()):
            checkpoint = {"model": checkpoint}
        if isinstance(checkpoint.get("model"), dict):
            args = checkpoint.get("args")
            if isinstance(args, argparse.Namespace):
                checkpoint["args"] = vars(args)
            return checkpoint
    raise CheckpointError(f"{str(path)!r} holds no weights: a dict with an entry 'model' is needed")


def load_weights(model: nn.Module, state_dict: dict[str, Tensor]) -> None:
    """Load a state dict strictly; the model is untouched when it does not fit.

    Raises:
        CheckpointError: Counts and names the missing, unexpected and wrongly shaped keys.
    """
    own = model.state_dict()
    missing = [key for key in own if key not in state_dict]
    unexpected = [key for key in state_dict if key not in own]
    wrong = [
        f"{key} is {_shape(value)}, the model's is {_shape(own[key])}"
        for key, value in state_dict.items()
        if key in own and _shape(value) != _shape(own[key])
    ]
    if missing or unexpected or wrong:
        problems = [("missing", missing), ("unexpected", unexpected), ("wrongly shaped", wrong)]
        listed = "; ".join(
            f"{len(keys)} {kind}: {_abridge(keys)}" for kind, keys in problems if keys
        )
        raise CheckpointError(f"the checkpoint does not fit {type(model).__name__}: {listed}")
    model.load_state_dict(state_dict)


def _shape(value: object) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else "no tensor"


def _abridge(items: list[str], most: int = 3) -> str:
    shown = ", ".join(items[:most])
    return shown if len(items) <= most else f"{shown} and {len(items) - most} more"
