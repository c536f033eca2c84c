"""The recipe of a trainer, and the function that trains it in a session.

A trainer builds the parts of its recipe (model, batches, step, optimizer, schedule, evaluation).
This module does the rest, which is the same for all trainers: it compiles and distributes the
model, resumes, trains and evaluates the epochs, updates the EMA, and writes checkpoints and logs.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
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
from engine.distributed import distribute, is_main, world_size
from engine.errors import UsageError
from engine.evaluation import Evaluate, check_finite, evaluate_models
from engine.logging import RunLog
from engine.loop import LoopOptions, TrainState, train_epoch
from engine.meters import TimeLeft
from engine.optim import make_scaler
from engine.optimizer_state import check_optimizer
from engine.progress import short_metrics
from engine.report import Report, ReportWriter
from engine.resumption import check_classes, check_position, check_scaler, check_scheduler
from engine.seeding import kept_random_state
from engine.session import Session, continues_in
from engine.signals import StopRequest
from engine.steps import steps_per_epoch, total_batch_size
from engine.summary import describe_training
from engine.tensors import unwrap
from engine.workers import WorkerError

__all__ = ["Recipe", "run_training"]

logger = logging.getLogger(__name__)


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
        sanity: Function like `evaluate` for the first two batches of the validation set, for
            `--val_sanity`; None checks nothing.
        report: Function that returns the details of the last evaluation; the main process calls it.
            None for no details.
        console_metrics: Names of the metrics, of `step` and of `evaluate`, that the console shows;
            None shows the first four of each.
        data: Lines about the data for the start of the log: title → text.
        ema: EMA of the weights; None for none. With `use_warmup`, its decay depends on the number
            of optimizer steps of the run.
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
    sanity: Evaluate | None = None
    report: Callable[[], Report] | None = None
    console_metrics: Sequence[str] | None = None
    data: Mapping[str, str] = field(default_factory=dict)
    ema: ModelEmaV3 | None = None
    dtype: torch.dtype
    clip_grad: float | None = None
    checkpoint_extras: Callable[[], Mapping[str, Any]] = dict
    versions: Mapping[str, str] = field(default_factory=dict)


def run_training(session: Session, recipe: Recipe) -> dict[str, Any]:
    """Train a recipe from the start, or from the session's checkpoint.

    Each epoch is trained, saved, evaluated if that is due, logged and saved again. The session's
    checkpoint restores optimizer, schedule and position; the trainer must already have loaded its
    weights into the model and the EMA.

    Args:
        session: Session of the run.
        recipe: Parts of the training.

    Returns:
        The content of the last checkpoint.

    Raises:
        UserError: The checkpoint does not fit this recipe, or a last metric is not finite.
        Stopped: A signal asked the run to stop; its checkpoint is saved.
        NonFiniteLossError: The loss is not finite in some process.
    """
    if session.config.eval:
        raise UsageError("this trainer has no --eval: it can only train")
    if session.config.log_images and recipe.report is None:
        raise UsageError("this trainer has no --log_images: it draws no pictures")
    training = _Training(session, recipe)
    training.run()
    return training.content()


class _Training:
    """One training of a recipe in a session."""

    def __init__(self, session: Session, recipe: Recipe) -> None:
        self.session, self.recipe, self.config = session, recipe, session.config
        trainable = [p.numel() for p in recipe.model.parameters() if p.requires_grad]
        self.num_parameters = sum(trainable)
        if self.config.compile:
            recipe.model.compile()
        self.model = distribute(recipe.model, session.device)
        scaler = make_scaler(session.device, recipe.dtype)
        self.state = TrainState(self.model, recipe.optimizer, scaler, self.config.start_epoch)
        self.total_batch_size = total_batch_size(self.config)
        self.options = LoopOptions(
            device=session.device,
            steps=steps_per_epoch(self.config, recipe.batches),
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            dtype=recipe.dtype,
            accumulate=self.config.accumulate_steps,
            clip_grad=recipe.clip_grad,
            print_freq=self.config.print_freq,
            console_metrics=recipe.console_metrics,
            max_steps=self.config.max_steps,
            checkpoint_steps=self.config.checkpoint_steps or 0,
            output_dir=session.output_dir,
        )
        # Metrics of an epoch that is trained and saved, but not yet evaluated.
        self.trained: dict[str, float] = {}
        if session.checkpoint is not None:
            self.restore(session.checkpoint)
        folder, keep = session.output_dir, self.config.keep_checkpoints
        writes = folder is not None and is_main()
        self.checkpoints = None
        if writes:
            first = self.state.epoch if continues_in(self.config) else 0
            self.checkpoints = CheckpointDir(folder, keep, first_epoch=first)
        self.reports = ReportWriter(folder) if writes else None

    def restore(self, checkpoint: Mapping[str, Any]) -> None:
        """Load optimizer, schedule and position from a checkpoint, after a check of all of them."""
        recipe = self.recipe
        check_position(checkpoint, self.options.steps, self.total_batch_size)
        check_classes(checkpoint, recipe.checkpoint_extras())
        check_optimizer(checkpoint["optimizer"], recipe.optimizer)
        check_scheduler(checkpoint["lr_scheduler"], recipe.scheduler)
        check_scaler(checkpoint.get("scaler"), self.state.scaler)
        self.state.load_state_dict(checkpoint)
        self.trained = dict(checkpoint.get("trained", {}))
        recipe.scheduler.load_state_dict(checkpoint["lr_scheduler"])
        before = checkpoint.get("images_per_step", self.total_batch_size)
        if before != self.total_batch_size:
            logger.warning(
                "total batch size changed from %d to %d images; the learning rate is not scaled",
                before,
                self.total_batch_size,
            )
            if recipe.schedule_per_step:
                # The same epoch is another number of steps now.
                recipe.scheduler.last_epoch = self.steps_done

    @property
    def steps_done(self) -> int:
        """Number of optimizer steps done in all epochs."""
        return self.state.steps_done(self.options.steps)

    def run(self) -> None:
        """Train all remaining epochs, at most `max_steps` optimizer steps in total."""
        config, options = self.config, self.options
        total = min(config.epochs * options.steps, config.max_steps or math.inf)
        self.describe(total)
        run_log = RunLog(
            options.output_dir,
            start_step=self.steps_done,
            loggers=config.loggers,
            config=dump(config),
        )
        with StopRequest() as stop, run_log as log:
            if self.steps_done == 0 and self.session.checkpoint is None and config.val_sanity:
                self.check_validation()
            if self.steps_done >= total and not self.needs_evaluation():
                logger.info("the run is complete: it has %d steps", self.steps_done)
            left = TimeLeft(total, self.steps_done)
            while not self.stops_early() and (self.steps_done < total or self.needs_evaluation()):
                self.run_epoch(stop, log, left, total)
                stop.check(self.save)
        if self.stops_early():
            logger.info(
                "early stop: no better %s than %.4g in the last %d evaluations",
                self.recipe.best_by,
                self.state.best,
                self.state.evals_since_best,
            )

    def stops_early(self) -> bool:
        """Return whether `early_stop` evaluations in sequence had no better metric."""
        patience = self.config.early_stop
        return patience is not None and self.state.evals_since_best >= patience

    def needs_evaluation(self) -> bool:
        """Return whether the run was stopped between an epoch, or its part, and the evaluation."""
        is_trained = bool(self.trained) or self.state.step == self.options.steps
        return self.state.epoch < self.config.epochs and is_trained

    def describe(self, total: int) -> None:
        """Log what the training starts with; `total` is the number of steps of the run."""
        recipe, config, steps = self.recipe, self.config, self.options.steps
        batch = f"{world_size()} process(es) x {config.batch_size} x {config.accumulate_steps}"
        lines = {
            **recipe.data,
            "steps": f"{steps:,} per epoch, {total:,} in the run",
            "total batch size": f"{self.total_batch_size} images ({batch} accumulated)",
            **describe_training(recipe.model, recipe.optimizer, recipe.dtype),
            **recipe.versions,
        }
        width = max(map(len, lines))
        for title, line in lines.items():
            logger.info("%-*s  %s", width, title, line)

    def evaluate(self, evaluate: Evaluate) -> dict[str, float]:
        """Return the metrics of the model and its EMA."""
        return evaluate_models(evaluate, unwrap(self.model), self.recipe.ema, self.options.device)

    def check_validation(self) -> None:
        """Evaluate the first batches of the validation set, and change nothing."""
        if self.recipe.sanity is None:
            return
        start = time.perf_counter()
        with kept_random_state():
            self.evaluate(self.recipe.sanity)
        seconds = time.perf_counter() - start
        logger.info("sanity check: evaluated two validation batches in %.3g s", seconds)

    def run_epoch(self, stop: StopRequest, log: RunLog, left: TimeLeft, total: int) -> None:
        """Train, evaluate, log and save one epoch, or its part before step `total` of the run.

        The state is saved before the evaluation too, so that a stop or a crash in it loses nothing.
        """
        state, options, recipe = self.state, self.options, self.recipe
        epoch = state.epoch
        start = state.step * options.batch_size * options.accumulate
        recipe.batches.sampler.set_epoch(epoch, start=start)
        try:
            trained = train_epoch(
                partial(recipe.step, self.model),
                recipe.batches,
                state,
                options,
                stop=stop,
                log=log,
                on_step=self.after_step,
                save=self.save,
                left=left,
            )
        except WorkerError:
            # It is raised between two optimizer steps, so the state is that of the last one.
            self.save()
            raise
        self.trained = trained or self.trained
        is_over = self.steps_done >= total
        is_whole = state.step == options.steps
        tested: dict[str, float] = {}
        if (epoch + 1) % self.config.eval_interval == 0 or is_over:
            if trained:
                self.save()
            with stop.at_once():
                tested = self.evaluate(recipe.evaluate)
        trained, self.trained = self.trained, {}
        best = tested[recipe.best_by] if tested else state.best
        is_best, state.best = best > state.best, max(state.best, best)
        if is_best:
            state.evals_since_best = 0
        elif tested and is_whole:
            state.evals_since_best += 1
        if is_whole:
            if not recipe.schedule_per_step:
                self.step_scheduler(epoch)
            state.finish_epoch()
        record = {"epoch": epoch, "n_parameters": self.num_parameters}
        record |= {f"train_{name}": value for name, value in trained.items()}
        record |= {f"test_{name}": value for name, value in tested.items()}
        log.write_epoch(record, self.steps_done)
        # Only a whole epoch has a numbered checkpoint.
        self.save(is_best=is_best, epoch=epoch if is_whole else None)
        if tested:
            text = short_metrics(tested, recipe.console_metrics)
            logger.info("epoch %d: %s  (best %s %.4g)", epoch, text, recipe.best_by, state.best)
            self.write_details(log, epoch, is_over or self.stops_early())
        if is_over:
            # Earlier epochs may recover; the state of this one is saved.
            check_finite(tested)

    def write_details(self, log: RunLog, epoch: int, is_last: bool) -> None:
        """Write the metrics of each class and the pictures of the last evaluation."""
        if self.recipe.report is None or self.reports is None:
            return
        report = self.recipe.report()
        self.reports.write(report, is_last=is_last, epoch=epoch)
        log.images(report.pictures, self.steps_done)

    def after_step(self) -> None:
        """Update the schedule and the EMA after an optimizer step."""
        if self.recipe.schedule_per_step:
            self.step_scheduler(self.state.epoch)
        ema = self.recipe.ema
        if ema is not None:
            # Without warm-up there is no step: timm would copy the weights at the first one.
            ema.update(unwrap(self.model), self.steps_done if ema.use_warmup else None)

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
            **({"trained": self.trained} if self.trained else {}),
        }
