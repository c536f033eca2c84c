"""A recipe, and the two things a session does with one: train it and evaluate it.

A trainer builds the parts of its recipe (model, batches, step, optimizer, schedule, evaluation).
Everything that is the same for all trainers is here: compiling and distributing the model,
resuming, the epochs, the EMA, checkpoints, logs and `eval.json`.
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
from engine.errors import UserError
from engine.logging import RunLog
from engine.loop import LoopOptions, TrainState, train_epoch
from engine.optim import make_scaler
from engine.provenance import provenance
from engine.run_config import total_batch_size
from engine.session import Session
from engine.signals import StopRequest
from engine.tensors import unwrap

__all__ = ["Evaluate", "Recipe", "run_evaluation", "run_training"]

logger = logging.getLogger(__name__)

Evaluate = Callable[[Mapping[str, nn.Module]], dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a trainer decides.

    Attributes:
        model: The model with its starting weights, on the session's device.
        batches: The training batches; `batches.sampler.set_epoch(epoch, start)` selects the epoch
            and the first sample of this process.
        step: Maps the model and a batch to scalar tensors: `loss`, which is minimized, and others
            to average and print. The batch may be changed in place.
        optimizer: The optimizer of the model's parameters.
        scheduler: A scheduler of torch, or one of timm, whose `step` gets the finished epoch and
            the best metric.
        schedule_per_step: Move the schedule after each optimizer step instead of each epoch.
        evaluate: Maps models by their prefix, `""` for the weights and `"ema_"` for their EMA, to
            metrics. All processes call it and get the same metrics.
        best_by: The metric to maximize, which selects the best checkpoint.
        ema: The EMA of the weights; None for none.
        dtype: The type of mixed precision; float32 for none.
        clip_grad: The largest norm of all gradients together; None does not clip.
        checkpoint_extras: More entries for every checkpoint, such as the class names.
        versions: More entries for the `provenance` in every checkpoint.
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
    dtype: torch.dtype = torch.float32
    clip_grad: float | None = None
    checkpoint_extras: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)


def one_line(metrics: Mapping[str, float]) -> str:
    """Format metrics in one line."""
    return "  ".join(f"{name} {value:.6g}" for name, value in metrics.items())


def run_training(session: Session, recipe: Recipe) -> dict[str, Any]:
    """Train from the start, or from where the session's checkpoint ended.

    Every epoch is trained and, if it is due, evaluated; then it is logged and saved. The session's
    checkpoint restores optimizer, schedule and position. The trainer has already loaded its weights
    into the model and the EMA.

    Returns:
        The content of the last checkpoint.

    Raises:
        UserError: The checkpoint does not belong to this recipe.
        Stopped: A signal asked the run to stop; its checkpoint is saved.
        NonFiniteLossError: The loss is not finite in some process.
    """
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
    describe: Callable[[Mapping[str, float]], str] = one_line,
) -> None:
    """Evaluate a model once; log its metrics and write them to `eval.json`.

    Args:
        session: The session.
        model: The model with its weights, on the session's device.
        evaluate: As in `Recipe`.
        ema: The EMA of the weights; None for none.
        num_images: Number of images in the validation set.
        describe: Formats the metrics for the log.
    """
    if session.config.compile:
        model.compile()
    start = time.perf_counter()
    metrics = _evaluate(evaluate, model, ema, session.device)
    speed = num_images / (time.perf_counter() - start)
    logger.info("%d images, %.4g images/s\n%s", num_images, speed, describe(metrics))
    if session.output_dir is not None and is_main():
        record = {f"test_{name}": value for name, value in metrics.items()}
        record |= {"images": num_images, "images_per_s": speed}
        (session.output_dir / "eval.json").write_text(json.dumps(record) + "\n")


class _Training:
    """The state of a training, and its epochs."""

    def __init__(self, session: Session, recipe: Recipe) -> None:
        self.session, self.recipe, self.config = session, recipe, session.config
        parameters = [p.numel() for p in recipe.model.parameters() if p.requires_grad]
        self.num_parameters = sum(parameters)
        logger.info("%d parameters are trained", self.num_parameters)
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
            steps=len(recipe.batches) // self.config.accumulate_steps,
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
        self.files = CheckpointDir(folder, keep) if folder is not None and is_main() else None

    def restore(self, checkpoint: Mapping[str, Any]) -> None:
        """Load optimizer, schedule and position from a checkpoint."""
        before = checkpoint.get("images_per_step", self.total_batch_size)
        if checkpoint.get("step") and before != self.total_batch_size:
            raise UserError(
                "the total batch size must stay the same within an epoch: the checkpoint is from "
                f"the middle of one at {before}, got {self.total_batch_size}; resume with the same "
                "batch size and number of processes"
            )
        try:
            self.state.load_state_dict(checkpoint)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"the checkpoint has another optimizer: {error}") from error
        self.recipe.scheduler.load_state_dict(checkpoint["lr_scheduler"])

    def run(self) -> None:
        """Train all epochs that remain."""
        state, options = self.state, self.options
        done = state.epoch * options.steps + state.step
        with StopRequest() as stop, RunLog(options.output_dir, start_step=done) as log:
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
        best = tested.get(recipe.best_by, state.best)
        is_best, state.best = best > state.best, max(state.best, best)
        if not recipe.schedule_per_step:
            self.move_schedule(epoch)
        state.finish_epoch()
        record = {"epoch": epoch, "n_parameters": self.num_parameters}
        record |= {f"train_{name}": value for name, value in trained.items()}
        record |= {f"test_{name}": value for name, value in tested.items()}
        log.write_epoch(record, state.epoch * options.steps)
        self.save(is_best=is_best, epoch=epoch)
        if tested:
            text = one_line(tested)
            logger.info("epoch %d: %s  (best %s %.6g)", epoch, text, recipe.best_by, state.best)

    def after_step(self) -> None:
        """Move the schedule and the EMA after an optimizer step."""
        if self.recipe.schedule_per_step:
            self.move_schedule(self.state.epoch)
        if self.recipe.ema is not None:
            self.recipe.ema.update(unwrap(self.model))

    def move_schedule(self, epoch: int) -> None:
        """Step the scheduler; timm's needs the finished epoch and the best metric."""
        scheduler = self.recipe.scheduler
        if isinstance(scheduler, LRScheduler):
            scheduler.step()
        else:
            scheduler.step(epoch, self.state.best)

    def save(self, *, is_best: bool = False, epoch: int | None = None) -> None:
        """Save a checkpoint, in the main process alone."""
        if self.files is not None:
            self.files.save(self.content(), is_best=is_best, epoch=epoch)

    def content(self) -> dict[str, Any]:
        """Return the content of a checkpoint."""
        ema = self.recipe.ema
        return {
            **self.state.state_dict(),
            "lr_scheduler": self.recipe.scheduler.state_dict(),
            "model_ema": ema.module.state_dict() if ema is not None else None,
            "args": dump(self.config),
            **self.recipe.checkpoint_extras,
            # The name of this key is older than the term "total batch size".
            "images_per_step": self.total_batch_size,
            "provenance": provenance() | self.recipe.versions,
        }


def _evaluate(
    evaluate: Evaluate, model: nn.Module, ema: ModelEmaV3 | None, device: torch.device
) -> dict[str, float]:
    """Return the metrics of a model and its EMA; an EMA on the CPU is on the device meanwhile."""
    models = {"": model}
    if ema is not None:
        models["ema_"] = ema.module.to(device)
    metrics = evaluate(models)
    if ema is not None and ema.device is not None:
        ema.module.to(ema.device)
    return metrics
