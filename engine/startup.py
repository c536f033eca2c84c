"""A run of a trainer: the options that all trainers have, how it starts, and how it goes on.

Between these two halves stands what differs: data, model, optimizer, schedule.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import Field, model_validator

from engine.checkpoint import CheckpointDir, check_writable
from engine.config import Config, dump
from engine.distributed import World, init_distributed
from engine.errors import UsageError, UserError
from engine.logging import setup_logging
from engine.loop import LoopOptions, TrainState
from engine.optim import DTYPES
from engine.provenance import provenance

logger = logging.getLogger(__name__)


class RunConfig(Config):
    """Run"""

    batch_size: int = Field(1, ge=1)
    """Images per process and step."""
    num_workers: int = Field(4, ge=0)
    """Loading processes per training process."""
    accumulate_steps: int = Field(1, ge=1)
    """Batches whose gradients are added up for one optimizer step."""
    epochs: int = Field(300, ge=1)
    """Passes over the data."""
    eval_interval: int = Field(1, ge=1)
    """Epochs from one evaluation to the next; the last epoch is always evaluated."""
    start_epoch: int = Field(0, ge=0)
    """First epoch; --resume sets it."""
    output_dir: str = ""
    """Where checkpoints and logs go; empty for none."""
    resume: str = ""
    """Checkpoint to go on from, a path or an address."""
    auto_resume: bool = False
    """Go on from the newest checkpoint in output_dir, if there is one."""
    eval: bool = False
    """Only evaluate."""
    seed: int = Field(0, ge=0)
    """Everything random follows from it."""
    device: str = "auto"
    """auto, cuda, cuda:N or cpu."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of autocast; auto is what the recipe was published with."""
    compile: bool = False
    """Compile the model with torch.compile."""
    checkpoint_steps: int | None = Field(None, ge=1)
    """Also write a checkpoint every so many optimizer steps; none only after every epoch."""
    keep_checkpoints: int = Field(1, ge=0)
    """How many checkpoint_<epoch>.pth to keep beside the last and the best."""
    print_freq: int = Field(10, ge=1)
    """Optimizer steps between two lines of output."""
    world_size: int = Field(1, ge=1)
    """Set by torchrun; a larger value given here must equal what torchrun started."""
    dist_url: Literal["env://"] = "env://"
    """How the processes find each other: by the launcher's environment."""

    @model_validator(mode="after")
    def _auto_resume_has_a_folder(self) -> "RunConfig":
        if self.auto_resume and not self.output_dir:
            raise ValueError("auto_resume needs output_dir, where it looks for checkpoints")
        return self


def start_run(config: RunConfig, **versions: str) -> tuple[World, Path | None]:
    """Join the processes, make the output directory, start logging and say what runs.

    A training's resolved configuration goes to `config.yaml` in the output directory.

    Args:
        config: The options.
        **versions: What else to record beside the revision and torch's version.

    Returns:
        This process's place, and the output directory if there is one.

    Raises:
        UserError: The output directory cannot be written.
        UsageError: A device or a number of processes that is not there.
    """
    world = init_distributed(config.device)
    output_dir = check_writable(config.output_dir) if config.output_dir else None
    setup_logging(output_dir, world.rank)
    if config.world_size not in (1, world.world_size):
        raise UsageError(
            f"--world_size is {config.world_size} but {world.world_size} processes were started: "
            "leave it to torchrun"
        )
    origin = provenance() | versions
    logger.info("%s, %d process(es), %s", world.device, world.world_size, origin)
    if output_dir is not None and world.is_main and not config.eval:
        text = yaml.safe_dump(dump(config), sort_keys=False)
        (output_dir / "config.yaml").write_text(f"# {json.dumps(origin)}\n{text}")
    return world, output_dir


def checkpoint_to_resume(config: RunConfig) -> str | None:
    """Where to go on from; an explicit checkpoint beats the newest in the output directory."""
    newest = None
    if config.auto_resume and not config.resume:
        newest = CheckpointDir(config.output_dir).latest()
    source = config.resume or (str(newest) if newest else None)
    if source:
        logger.info("resuming from %s", source)
    return source


def images_per_step(config: RunConfig, world: World) -> int:
    """Images of an optimizer step over all processes."""
    return config.batch_size * config.accumulate_steps * world.world_size


def check_resumable(checkpoint: Mapping[str, Any]) -> None:
    """Tell a checkpoint of weights alone before anything is built for it.

    Raises:
        UserError: It has no optimizer, schedule or epoch to go on with.
    """
    missing = [name for name in ("optimizer", "lr_scheduler", "epoch") if name not in checkpoint]
    if missing:
        raise UserError(
            f"the checkpoint has no {', '.join(missing)} to resume training with: "
            "use --finetune to start from its weights, or --eval"
        )


def restore(
    state: TrainState, scheduler: Any, checkpoint: Mapping[str, Any], images_per_step: int
) -> None:
    """Bring optimizer, schedule and position back; the weights are the caller's to load.

    Args:
        state: The fresh state.
        scheduler: With `load_state_dict`.
        checkpoint: What a run saved; `images_per_step` in it is compared.
        images_per_step: Of this run.

    Raises:
        UserError: The checkpoint is not of this optimizer, or is from the middle of an epoch whose
            steps were of another size.
    """
    before = checkpoint.get("images_per_step", images_per_step)
    if checkpoint.get("step") and before != images_per_step:
        raise UserError(
            f"the checkpoint is from the middle of an epoch at {before} images a step, now it is "
            f"{images_per_step}: resume with the same batch size and number of processes"
        )
    try:
        state.load_state_dict(checkpoint)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"the checkpoint's optimizer is not this run's: {error}") from error
    scheduler.load_state_dict(checkpoint["lr_scheduler"])


def loop_options(
    config: RunConfig,
    world: World,
    *,
    steps: int,
    dtype: torch.dtype,
    clip_grad: float | None,
    output_dir: Path | None,
) -> LoopOptions:
    """What the loop takes from a run's options, and what only its trainer knows."""
    return LoopOptions(
        device=world.device,
        steps=steps,
        batch_size=config.batch_size,
        seed=config.seed,
        dtype=dtype,
        accumulate=config.accumulate_steps,
        clip_grad=clip_grad,
        print_freq=config.print_freq,
        checkpoint_steps=config.checkpoint_steps or 0,
        output_dir=output_dir,
    )


def resolve_dtype(name: str, *, auto: torch.dtype) -> torch.dtype:
    """The dtype of an option `dtype`."""
    return auto if name == "auto" else DTYPES[name]
