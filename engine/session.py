"""The session of a run: its configuration, device, output folder and checkpoint to resume.

Every trainer begins with `start_session`. `engine.recipe` then trains or evaluates in the session.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
import yaml

from engine.checkpoint import CheckpointDir, check_writable
from engine.config import dump
from engine.distributed import (
    all_gather_object,
    broadcast_object,
    init_distributed,
    is_main,
    rank,
    world_size,
)
from engine.errors import UsageError, UserError
from engine.folder_lock import lock_folder
from engine.loggers import check_loggers
from engine.logging import setup_logging
from engine.optional import require
from engine.provenance import provenance
from engine.run_config import RunConfig

__all__ = ["Session", "continues_in", "start_session"]

logger = logging.getLogger(__name__)

_END = 1 << 20  # bytes


@dataclass(frozen=True)
class Session:
    """What one process uses from the start to the end of a run.

    Attributes:
        config: Options of the run.
        device: Device of this process.
        output_dir: Existing folder for checkpoints and logs; None for none.
        checkpoint: Content of the checkpoint to resume or to evaluate; None for none.
        provenance: Git revision and versions at the start of the run.
        lock: Open file of the lock of the output folder, in the main process of a training.
    """

    config: RunConfig
    device: torch.device
    output_dir: Path | None
    checkpoint: Mapping[str, Any] | None
    provenance: Mapping[str, str | None]
    lock: TextIO | None = None


def start_session(
    config: RunConfig,
    load: Callable[[str], Mapping[str, Any]],
    complete: Callable[[Any, Mapping[str, Any] | None], Any] | None = None,
    **versions: str,
) -> Session:
    """Join the process group, create the output folder, start logging and load the checkpoint.

    A training writes all its options to `config.yaml` in the output folder.

    Args:
        config: Options of the run.
        load: Function that reads a checkpoint from a path or URL.
        complete: Function that returns the options completed from the checkpoint to resume or to
            evaluate, which is None if there is none; see `engine.with_saved_options`.
        **versions: Versions to record, in addition to those of Python and torch.

    Raises:
        UserError: The output folder cannot be written or another run uses it, a logger is not
            installed, or the checkpoint cannot resume a training.
        UsageError: The device does not exist, or the number of processes is wrong.
    """
    device = init_distributed(config.device)
    output_dir = check_writable(config.output_dir) if config.output_dir else None
    locks = output_dir is not None and is_main() and not config.eval
    lock = lock_folder(output_dir) if locks else None
    setup_logging(output_dir, rank())
    if config.world_size not in (1, world_size()):
        raise UsageError(
            f"--world-size must be the number of started processes, {world_size()}, "
            f"got {config.world_size}; omit it, since torchrun sets it"
        )
    if output_dir is not None and is_main() and not config.eval:
        check_loggers(config.loggers)
    if config.log_images:
        require("matplotlib", "--log-images")
    origin = provenance() | versions
    logger.info("%s, %d process(es), %s", device, world_size(), origin)
    if not config.eval:
        _check_nothing_is_lost(config)
    # The output folder may be local to a node.
    source = broadcast_object(_checkpoint_to_resume(config))
    checkpoint = _load_same(source, load) if source else None
    if checkpoint is not None and not config.eval:
        _check_resumable(checkpoint)
    if complete is not None:
        config = complete(config, checkpoint)
    if output_dir is not None and is_main() and not config.eval:
        text = yaml.safe_dump(dump(config), sort_keys=False)
        (output_dir / "config.yaml").write_text(f"# {json.dumps(origin)}\n{text}")
    return Session(config, device, output_dir, checkpoint, origin, lock)


def continues_in(config: RunConfig) -> bool:
    """Return whether the run continues the one in its own output folder."""
    if not config.resume:
        return config.auto_resume
    return Path(config.resume).absolute().parent == Path(config.output_dir).absolute()


def _check_nothing_is_lost(config: RunConfig) -> None:
    """Raise UsageError if a new run would replace another one; warn if it would save nothing."""
    if not is_main():
        return
    if not config.output_dir:
        logger.warning("no --output_dir: this training saves neither checkpoints nor logs")
        return
    is_asked_for = config.overwrite or config.auto_resume or continues_in(config)
    if not is_asked_for and CheckpointDir(config.output_dir).is_used():
        raise UsageError(
            f"--output_dir {config.output_dir} has the checkpoints of a run: continue it with "
            "--auto-resume, replace it with --overwrite, or give another folder"
        )


def _checkpoint_to_resume(config: RunConfig) -> str | None:
    """Return `resume`; if it is empty and `auto_resume` is set, the last checkpoint's path.

    Only the result of the main process counts.
    """
    source = config.resume or None
    if config.auto_resume and not source:
        last = CheckpointDir(config.output_dir).latest()
        source = str(last) if last else None
    if source:
        logger.info("reading checkpoint %s", source)
    return source


def _load_same(source: str, load: Callable[[str], Mapping[str, Any]]) -> Mapping[str, Any]:
    """Load a checkpoint, which is that of the main process in all processes."""
    files = all_gather_object(_fingerprint(source))
    if all(file == files[0] for file in files):
        return load(source)
    return broadcast_object(load(source) if is_main() else None)


def _fingerprint(source: str) -> tuple[int, str] | None:
    """Return the size of a file and the hash of its end; None if there is no such file.

    The checksums of all tensors are at the end of a file of `torch.save`.
    """
    try:
        with Path(source).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _END))
            return size, hashlib.sha256(file.read()).hexdigest()
    except OSError:
        return None


def _check_resumable(checkpoint: Mapping[str, Any]) -> None:
    """Raise UserError for a checkpoint with weights only, before data and model are built."""
    missing = [name for name in ("optimizer", "lr_scheduler", "epoch") if name not in checkpoint]
    if missing:
        raise UserError(
            f"the checkpoint has no {', '.join(missing)} to resume training with: "
            "use --finetune to start from its weights, or --eval"
        )
