"""What every trainer needs and no trainer is: it knows neither models nor data sets.

Configuration, processes, seeds, the loop, checkpoints, logs, and how to stop. A trainer's `main()`
puts these together and reads like its recipe.
"""

from engine.checkpoint import CheckpointDir, atomic_save, check_writable, replacing
from engine.cli import run
from engine.config import Config, dump, parse_config
from engine.distributed import World, all_gather_object, distribute, init_distributed
from engine.errors import UsageError, UserError
from engine.fit import fit
from engine.logging import RunLog, setup_logging
from engine.loop import LoopOptions, TrainState, train_epoch
from engine.meters import Meters, Throughput, peak_memory_mb
from engine.nonfinite import NonFiniteLossError
from engine.optim import DTYPES, autocast, make_scaler
from engine.provenance import provenance
from engine.seeding import derive_seed, seed_all
from engine.signals import Stopped, StopRequest, shield_worker
from engine.startup import (
    RunConfig,
    check_resumable,
    checkpoint_to_resume,
    images_per_step,
    loop_options,
    resolve_dtype,
    restore,
    start_run,
)
from engine.tensors import copy_to, unwrap

__all__ = [
    "Config",
    "parse_config",
    "dump",
    "provenance",
    "RunConfig",
    "start_run",
    "checkpoint_to_resume",
    "check_resumable",
    "restore",
    "images_per_step",
    "loop_options",
    "resolve_dtype",
    "run",
    "UserError",
    "UsageError",
    "World",
    "init_distributed",
    "distribute",
    "all_gather_object",
    "derive_seed",
    "seed_all",
    "LoopOptions",
    "TrainState",
    "train_epoch",
    "fit",
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
]
