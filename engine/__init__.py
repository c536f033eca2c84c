"""Everything that trainers share. It contains no model and no data set.

A trainer starts a session (`start_session`), builds a `Recipe` and hands it to `run_training` or
`run_evaluation`. Below them are the configuration, processes, seeds, the training loop,
checkpoints, logs and signals.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# Not lazy: the module of the same name would hide the function.
from engine.provenance import provenance

if TYPE_CHECKING:
    from engine.checkpoint import CheckpointDir, atomic_save, check_writable, replacing
    from engine.cli import run
    from engine.config import Config, dump, parse_config
    from engine.distributed import (
        all_gather_object,
        distribute,
        init_distributed,
        is_main,
        rank,
        world_size,
    )
    from engine.errors import UsageError, UserError
    from engine.evaluation import Evaluate, run_evaluation
    from engine.logging import RunLog, setup_logging
    from engine.loop import LoopOptions, TrainState, train_epoch
    from engine.meters import Meters, Throughput, peak_memory_mb
    from engine.nonfinite import NonFiniteLossError
    from engine.optim import DTYPES, autocast, make_scaler, resolve_dtype
    from engine.optional import require
    from engine.recipe import Recipe, run_training
    from engine.report import Report
    from engine.run_config import RunConfig
    from engine.saved_options import with_saved_options
    from engine.seeding import derive_seed, seed_all
    from engine.session import Session, start_session
    from engine.signals import Stopped, StopRequest
    from engine.steps import steps_per_epoch, total_batch_size
    from engine.tensors import copy_to, unwrap
    from engine.workers import shield_worker

_MODULES = {
    "Config": "config",
    "parse_config": "config",
    "dump": "config",
    "RunConfig": "run_config",
    "total_batch_size": "steps",
    "steps_per_epoch": "steps",
    "resolve_dtype": "optim",
    "Session": "session",
    "start_session": "session",
    "with_saved_options": "saved_options",
    "Recipe": "recipe",
    "Evaluate": "evaluation",
    "Report": "report",
    "require": "optional",
    "run_training": "recipe",
    "run_evaluation": "evaluation",
    "run": "cli",
    "UserError": "errors",
    "UsageError": "errors",
    "init_distributed": "distributed",
    "rank": "distributed",
    "world_size": "distributed",
    "is_main": "distributed",
    "distribute": "distributed",
    "all_gather_object": "distributed",
    "derive_seed": "seeding",
    "seed_all": "seeding",
    "LoopOptions": "loop",
    "TrainState": "loop",
    "train_epoch": "loop",
    "DTYPES": "optim",
    "autocast": "optim",
    "make_scaler": "optim",
    "copy_to": "tensors",
    "unwrap": "tensors",
    "Meters": "meters",
    "Throughput": "meters",
    "peak_memory_mb": "meters",
    "CheckpointDir": "checkpoint",
    "atomic_save": "checkpoint",
    "check_writable": "checkpoint",
    "replacing": "checkpoint",
    "RunLog": "logging",
    "setup_logging": "logging",
    "StopRequest": "signals",
    "Stopped": "signals",
    "shield_worker": "workers",
    "NonFiniteLossError": "nonfinite",
}

__all__ = [*_MODULES, "provenance"]


def __getattr__(name: str) -> Any:
    """Import a public name at its first use, so that `--help` does not wait for torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    """Return all names, also those that are not imported yet."""
    return sorted({*globals(), *_MODULES})
