"""The options that every trainer has.

A trainer's configuration inherits from `RunConfig` and adds its model, data and recipe.
"""

from typing import Literal

import torch
from pydantic import Field, model_validator

from engine.config import Config
from engine.distributed import world_size
from engine.optim import DTYPES

__all__ = ["RunConfig", "resolve_dtype", "total_batch_size"]


class RunConfig(Config):
    """Run."""

    batch_size: int = Field(1, ge=1)
    """Input batch size per process."""
    num_workers: int = Field(4, ge=0)
    """Number of data loading processes per training process."""
    accumulate_steps: int = Field(1, ge=1)
    """Number of batches whose gradients are added up for one optimizer step."""
    epochs: int = Field(300, ge=1)
    """Number of epochs to train."""
    eval_interval: int = Field(1, ge=1)
    """Evaluate every so many epochs; the last epoch is always evaluated."""
    start_epoch: int = Field(0, ge=0)
    """Epoch to start from; --resume sets it."""
    output_dir: str = ""
    """Folder for checkpoints and logs; empty writes no files."""
    resume: str = ""
    """Path or URL of a checkpoint to resume from."""
    auto_resume: bool = False
    """Resume from the last checkpoint in output_dir if there is one."""
    eval: bool = False
    """Evaluate only, without training."""
    seed: int = Field(0, ge=0)
    """Random seed."""
    device: str = "auto"
    """Device to run on: auto, cuda, cuda:N or cpu."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of automatic mixed precision; auto is that of the published recipe."""
    compile: bool = False
    """Compile the model with torch.compile."""
    checkpoint_steps: int | None = Field(None, ge=1)
    """Also save a checkpoint every so many optimizer steps; none saves after each epoch only."""
    keep_checkpoints: int = Field(1, ge=0)
    """Number of checkpoint_<epoch>.pth files to keep in addition to the last and the best."""
    print_freq: int = Field(10, ge=1)
    """Print the metrics every so many optimizer steps."""
    world_size: int = Field(1, ge=1)
    """Number of processes, set by torchrun; a larger value must equal what torchrun started."""
    dist_url: Literal["env://"] = "env://"
    """Rendezvous of the processes: the environment variables that the launcher sets."""

    @model_validator(mode="after")
    def _auto_resume_has_a_folder(self) -> "RunConfig":
        if self.auto_resume and not self.output_dir:
            raise ValueError("auto_resume needs output_dir, the folder of the checkpoints")
        return self


def total_batch_size(config: RunConfig) -> int:
    """Return the number of images per optimizer step over all processes."""
    return config.batch_size * config.accumulate_steps * world_size()


def resolve_dtype(name: str, *, auto: torch.dtype) -> torch.dtype:
    """Return the dtype that an option `dtype` names; `auto` is the trainer's choice."""
    return auto if name == "auto" else DTYPES[name]
