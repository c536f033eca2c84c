"""The recipe of a trainer, and the functions that train and evaluate in a session.

A trainer builds the parts of its recipe (model, batches, step, optimizer, schedule, evaluation).
This module does the rest, which is the same for all trainers: it compiles and distributes the
model, resumes, trains and evaluates the epochs, updates the EMA, and writes checkpoints, logs and
`eval.json`.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from engine.checkpoint import CheckpointDir
from engine.config import dump
from engine.distributed import distribute, is_main
from engine.errors import UsageError, UserError
from engine.logging import RunLog
from engine.loop import LoopOptions, TrainState, train_epoch
from engine.optim import make_scaler
from engine.run_config import steps_per_epoch, total_batch_size
from engine.session import Session
from engine.signals import StopRequest
from engine.tensors import unwrap

__all__ = ["Evaluate", "Recipe", "run_evaluation", "run_training"]

logger = logging.getLogger(__name__)

Evaluate = Callable[[Mapping[str, nn.Module]], dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The parts of a training that each trainer chooses.

    Attributes:
        model: Model with its initial weights, on the session's device.
        batches: Loader of the training batches. Its sampler has `set_epoch(epoch, start)`, which
            sets the epoch and the first sample of this process.
        step: Function of the model and a batch on the device that returns scalar tensors: `loss`,
            which is minimized, and other metrics to average and print. It may change the batch in
            place.
        optimizer: Optimizer of the model's parameters.
        scheduler: Scheduler of torch, or of timm, whose `step` gets the finished epoch and the best
            metric.
        schedule_per_step: Step the scheduler after each optimizer step instead of each epoch.
        evaluate: Function that returns the metrics of models. It gets a dict with the model under
            `""` and its EMA, if there is one, under `"ema_"`; these keys are the prefixes of the
            names of their metrics. All processes call it, and it must return the same in all.
        best_by: Name of the metric to maximize, which selects the best checkpoint.
        ema: EMA of the weights; None for none.
        dtype: Type of mixed precision; float32 for none.
        clip_grad: Largest norm of all gradients together; None does not clip.
        checkpoint_extras: Function that returns further entries for every checkpoint, such as the
            class names.
        versions: Further entries for the `provenance` in every checkpoint, such as the operators.
    """

    model: nn.Module
    batches: DataLoader
    step: Callable[[nn.Module, Any], dict[str, Tensor]]
    optimizer: torch.optim.Optimizer
    scheduler: Any
    schedule_per_step: bool = False
    evaluate: Evaluate
    best_by: str
    ema: ModelEmaV3 | None = None
    dtype: torch.dtype
    clip_grad: float | None = None
    checkpoint_extras: Callable[[], Mapping[str, Any]] = dict
    versions: Mapping[str, str] = field(default_factory=dict)


def format_metrics(metrics: Mapping[str, float]) -> str:
    """Format metrics in one line."""
    return "  ".join(f"{name} {value:.6g}" for name, value in metrics.items())


def run_training(session: Session, recipe: Recipe) -> dict[str, Any]:
    """Train a recipe from the start, or from the session's checkpoint.

    Each epoch is trained, evaluated if that is due, logged and saved. The session's checkpoint
    restores optimizer, schedule and position; the trainer must already have loaded its weights into
    the model and the EMA.

    Args:
        session: Session of the run.
        recipe: Parts of the training.

    Returns:
        The content of the last checkpoint.

    Raises:
        UserError: The checkpoint does not fit this recipe.
        Stopped: A signal asked the run to stop; its checkpoint is saved.
        NonFiniteLossError: The loss is not finite in some process.
    """
    if session.config.eval:
        raise UsageError("this trainer has no --eval: it can only train")
    training = _Training(session, recipe)
    training.run()
    return training.content()


def run_evaluation(
    session: Session,
    model: nn.Module,
    evaluate: Evaluate,
    *,
    ema: ModelEmaV3 | None,
    num_images: int,
    describe: Callable[[Mapping[str, float]], str] = format_metrics,
) -> None:
    """Evaluate a model once; log its metrics and write them to `eval.json`.

    Args:
        session: Session of the run.
        model: Model with its weights, on the session's device.
        evaluate: Function that returns the metrics, as in `Recipe`.
        ema: EMA of the weights; None for none.
        num_images: Number of images in the validation set.
        describe: Function that formats the metrics for the log.
    """
    if session.config.compile:
        model.compile()
    start = time.perf_counter()
    metrics = _evaluate(evaluate, model, ema, session.device)
    images_per_s = num_images / (time.perf_counter() - start)
    logger.info("%d images, %.4g images/s\n%s", num_images, images_per_s, describe(metrics))
    if session.output_dir is not None and is_main():
        record = {f"test_{name}": value for name, value in metrics.items()}
        record |= {"images": num_images, "images_per_s": images_per_s}
        (session.output_dir / "eval.json").write_text(json.dumps(record) + "\n")


class _Training:
    """One training of a recipe in a session."""

    def __init__(self, session: Session, recipe: Recipe) -> None:
        self.session, self.recipe, self.config = session, recipe, session.config
        trainable = [p.numel() for p in recipe.model.parameters() if p.requires_grad]
        self.num_parameters = sum(trainable)
        logger.info("%d trainable parameters", self.num_parameters)
        if self.config.compile:
            recipe.model.compile()
        self.model = distribute(recipe.model, session.device)
        scaler = make_scaler(session.device, recipe.dtype)
        self.state = TrainState(self.model, recipe.optimizer, scaler, self.config.start_epoch)
        self.total_batch_size = total_batch_size(self.config)
        if session.checkpoint is not None:
            self.restore(session.checkpoint)
        self.options = LoopOptions(
            device=session.device,
            steps=steps_per_epoch(self.config, recipe.batches),
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            dtype=recipe.dtype,
            accumulate=self.config.accumulate_steps,
            clip_grad=recipe.clip_grad,
            print_freq=self.config.print_freq,
            checkpoint_steps=self.config.checkpoint_steps or 0,
            output_dir=session.output_dir,
        )
        folder, keep = session.output_dir, self.config.keep_checkpoints
        self.checkpoints = CheckpointDir(folder, keep) if folder is not None and is_main() else None

    def restore(self, checkpoint: Mapping[str, Any]) -> None:
        """Load optimizer, schedule and position from a checkpoint."""
        before = checkpoint.get("images_per_step", self.total_batch_size)
        if checkpoint.get("step") and before != self.total_batch_size:
            raise UserError(
                f"the total batch size must be {before}, as in the checkpoint, which is from the "
                f"middle of an epoch, got {self.total_batch_size}; resume with the same batch size "
                "and number of processes"
            )
        try:
            self.state.load_state_dict(checkpoint)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"the checkpoint is of another optimizer: {error}") from error
        self.recipe.scheduler.load_state_dict(checkpoint["lr_scheduler"])

    def run(self) -> None:
        """Train all remaining epochs."""
        state, options = self.state, self.options
        start_step = state.epoch * options.steps + state.step
        with StopRequest() as stop, RunLog(options.output_dir, start_step=start_step) as log:
            while state.epoch < self.config.epochs:
                self.run_epoch(stop, log)
                stop.check(self.save)

    def run_epoch(self, stop: StopRequest, log: RunLog) -> None:
        """Train, evaluate, log and save one epoch."""
        state, options, recipe = self.state, self.options, self.recipe
        epoch = state.epoch
        start = state.step * options.batch_size * options.accumulate
        recipe.batches.sampler.set_epoch(epoch, start=start)
        trained = train_epoch(
            partial(recipe.step, self.model),
            recipe.batches,
            state,
            options,
            stop=stop,
            log=log,
            on_step=self.after_step,
            save=self.save,
        )
        tested: dict[str, float] = {}
        if (epoch + 1) % self.config.eval_interval == 0 or epoch + 1 == self.config.epochs:
            tested = _evaluate(recipe.evaluate, unwrap(self.model), recipe.ema, options.device)
        best = tested[recipe.best_by] if tested else state.best
        is_best, state.best = best > state.best, max(state.best, best)
        if not recipe.schedule_per_step:
            self.step_scheduler(epoch)
        state.finish_epoch()
        record = {"epoch": epoch, "n_parameters": self.num_parameters}
        record |= {f"train_{name}": value for name, value in trained.items()}
        record |= {f"test_{name}": value for name, value in tested.items()}
        log.write_epoch(record, state.epoch * options.steps)
        self.save(is_best=is_best, epoch=epoch)
        if tested:
            text = format_metrics(tested)
            logger.info("epoch %d: %s  (best %s %.6g)", epoch, text, recipe.best_by, state.best)

    def after_step(self) -> None:
        """Update the schedule and the EMA after an optimizer step."""
        if self.recipe.schedule_per_step:
            self.step_scheduler(self.state.epoch)
        if self.recipe.ema is not None:
            self.recipe.ema.update(unwrap(self.model))

    def step_scheduler(self, epoch: int) -> None:
        """Step the scheduler; those of timm need the epoch and the best metric."""
        scheduler = self.recipe.scheduler
        if isinstance(scheduler, LRScheduler):
            scheduler.step()
        else:
            scheduler.step(epoch, self.state.best)

    def save(self, *, is_best: bool = False, epoch: int | None = None) -> None:
        """Save a checkpoint, only in the main process."""
        if self.checkpoints is not None:
            self.checkpoints.save(self.content(), is_best=is_best, epoch=epoch)

    def content(self) -> dict[str, Any]:
        """Return the content of a checkpoint."""
        ema = self.recipe.ema
        return {
            **self.state.state_dict(),
            "lr_scheduler": self.recipe.scheduler.state_dict(),
            "model_ema": ema.module.state_dict() if ema is not None else None,
            "args": dump(self.config),
            **self.recipe.checkpoint_extras(),
            # The name of this key is older than the term "total batch size".
            "images_per_step": self.total_batch_size,
            "provenance": {**self.session.provenance, **self.recipe.versions},
        }


def _evaluate(
    evaluate: Evaluate, model: nn.Module, ema: ModelEmaV3 | None, device: torch.device
) -> dict[str, float]:
    """Return the metrics of a model and its EMA, which may be on the CPU between evaluations."""
    models = {"": model}
    if ema is not None:
        models["ema_"] = ema.module.to(device)
    metrics = evaluate(models)
    if ema is not None and ema.device is not None:
        ema.module.to(ema.device)
    return metrics
