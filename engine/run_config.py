"""The options that every trainer has.

A trainer's configuration inherits from `RunConfig` and adds its model, data and recipe.
"""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from engine.config import Config
from engine.flags import COMMON, HIDDEN
from engine.loggers import LOGGERS

__all__ = ["RunConfig"]


class RunConfig(Config):
    """Training loop, checkpoints and logs."""

    output_dir: Annotated[str, COMMON] = ""
    """Folder for checkpoints and logs; empty writes no files."""
    resume: Annotated[str, COMMON] = ""
    """Path or URL of a checkpoint to resume from, or to evaluate with --eval."""
    eval: Annotated[bool, COMMON] = False
    """Evaluate only, without training."""
    epochs: Annotated[int, COMMON] = Field(300, ge=1)
    """Number of epochs to train."""
    batch_size: Annotated[int, COMMON] = Field(1, ge=1)
    """Input batch size for training, per process."""
    device: Annotated[str, COMMON] = "auto"
    """Device to run on: auto, cuda, cuda:N or cpu."""
    num_workers: int = Field(4, ge=0, le=1024)
    """Number of data loading processes per training process."""
    accumulate_steps: int = Field(1, ge=1)
    """Number of batches to accumulate gradients over, per optimizer step."""
    eval_interval: int = Field(1, ge=1)
    """Number of epochs between evaluations; the last epoch is always evaluated."""
    early_stop: int | None = Field(None, ge=1)
    """Number of evaluations without better top-1 accuracy or AP after which training ends; none
    trains all epochs."""
    start_epoch: int = Field(0, ge=0)
    """Epoch to start from; a resumed checkpoint overrides it."""
    auto_resume: bool = False
    """Resume from the last checkpoint in output_dir if there is one."""
    overwrite: bool = False
    """Start a new run in an output_dir that has one, and replace its checkpoints."""
    seed: int = Field(0, ge=0, lt=2**64)
    """Random seed."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of mixed precision; auto selects that of the published recipe."""
    compile: bool = False
    """Compile the model with torch.compile."""
    checkpoint_steps: int | None = Field(None, ge=1)
    """Number of optimizer steps between checkpoints within an epoch; none disables them."""
    keep_checkpoints: int = Field(1, ge=0)
    """Number of checkpoint_<epoch>.pth files to keep, in addition to the last and the best."""
    print_freq: int = Field(10, ge=1)
    """Number of optimizer steps between printed metrics."""
    max_steps: int | None = Field(None, ge=1)
    """Number of optimizer steps after which training ends, with evaluation and checkpoint, also
    within an epoch; the schedule stays that of epochs; none trains all epochs."""
    val_sanity: bool = True
    """Evaluate two batches before the first epoch of a new run, to find errors early."""
    log_images: int = Field(0, ge=0)
    """Number of validation images to draw with predictions and send to the loggers, per
    evaluation."""
    logger: str | None = "tensorboard"
    """Loggers of curves and pictures: tensorboard, wandb, mlflow, several with commas, or none."""
    world_size: Annotated[int, HIDDEN] = Field(1, ge=1)
    """Number of processes; torchrun sets it, and any value above 1 must equal that of torchrun."""
    dist_url: Annotated[Literal["env://"], HIDDEN] = "env://"
    """URL used to set up distributed training; env:// reads the variables of the launcher."""

    @field_validator("logger")
    @classmethod
    def _check_logger(cls, names: str | None) -> str | None:
        """Refuse an unknown logger, and one that is named twice."""
        parts = names.split(",") if names else []
        if not set(parts) <= set(LOGGERS) or len(set(parts)) < len(parts):
            raise ValueError(f"must be {', '.join(LOGGERS)}, or several of them with commas")
        return names

    @property
    def loggers(self) -> tuple[str, ...]:
        """Names of the loggers."""
        return tuple(self.logger.split(",")) if self.logger else ()

    @model_validator(mode="after")
    def _check_loggers(self) -> "RunConfig":
        """Check that loggers have a folder and pictures have a logger."""
        if not self.output_dir and self.loggers not in ((), ("tensorboard",)):
            raise ValueError(f"--logger {self.logger} needs --output-dir, the folder of the run")
        if self.log_images and not self.output_dir:
            raise ValueError("--log-images needs --output-dir, the folder of the run")
        if self.log_images and not self.loggers and not self.eval:
            raise ValueError("--log-images needs --logger, which gets the pictures")
        return self

    @model_validator(mode="after")
    def _check_auto_resume(self) -> "RunConfig":
        """Check that there is a folder to resume from."""
        if self.auto_resume and not self.output_dir:
            raise ValueError("--auto-resume needs --output-dir, the folder of the checkpoints")
        if self.auto_resume and self.overwrite:
            raise ValueError(
                "--overwrite and --auto-resume exclude each other: one starts a new run, the other "
                "continues the last one"
            )
        return self
