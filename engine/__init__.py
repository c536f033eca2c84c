"""Everything that trainers share. It contains no model and no data set.

A trainer starts a session (`start_session`), builds a `Recipe` and hands it to `run_training` or
`run_evaluation`. Below them are the configuration, processes, seeds, the training loop,
checkpoints, logs and signals.
"""

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
from engine.optim import DTYPES, autocast, make_scaler
from engine.optional import require
from engine.provenance import provenance
from engine.recipe import Recipe, run_training
from engine.report import Report
from engine.run_config import RunConfig, resolve_dtype, steps_per_epoch, total_batch_size
from engine.saved_options import with_saved_options
from engine.seeding import derive_seed, seed_all
from engine.session import Session, start_session
from engine.signals import Stopped, StopRequest, shield_worker
from engine.tensors import copy_to, unwrap

__all__ = [
    "Config",
    "parse_config",
    "dump",
    "RunConfig",
    "total_batch_size",
    "steps_per_epoch",
    "resolve_dtype",
    "Session",
    "start_session",
    "with_saved_options",
    "Recipe",
    "Evaluate",
    "Report",
    "require",
    "run_training",
    "run_evaluation",
    "run",
    "UserError",
    "UsageError",
    "init_distributed",
    "rank",
    "world_size",
    "is_main",
    "distribute",
    "all_gather_object",
    "derive_seed",
    "seed_all",
    "LoopOptions",
    "TrainState",
    "train_epoch",
    "DTYPES",
    "autocast",
    "make_scaler",
    "copy_to",
    "unwrap",
    "Meters",
    "Throughput",
    "peak_memory_mb",
    "CheckpointDir",
    "atomic_save",
    "check_writable",
    "replacing",
    "RunLog",
    "setup_logging",
    "StopRequest",
    "Stopped",
    "shield_worker",
    "NonFiniteLossError",
    "provenance",
]
