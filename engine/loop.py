"""The training loop: one epoch of any model on any data, given a function for one step.

An optimizer step uses `accumulate` batches. For each batch the loop seeds the random generators,
runs the forward and backward passes, and checks that the loss is finite. Then it clips the
gradients and steps the optimizer. After each optimizer step it calls `on_step`, prints the metrics
and saves a checkpoint if they are due, and stops if a signal has asked for it. Checkpoints are
saved only between two optimizer steps.

A resumed run equals an uninterrupted one exactly, without saved states of random generators: each
forward pass is seeded from (seed, epoch, batch, rank). The loader must seed its samples in the same
way, and must begin with the first batch of the step at which training resumes.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.distributed import any_process_later, rank, world_size
from engine.logging import RunLog
from engine.meters import Meters, Throughput, TimedBatches, TimeLeft, peak_memory_mb
from engine.nonfinite import report_nonfinite
from engine.optim import autocast, optimizer_step
from engine.progress import Progress, step_line
from engine.seeding import derive_seed, seed_all
from engine.signals import StopRequest
from engine.tensors import copy_to, unwrap

__all__ = ["LoopOptions", "StepFn", "TrainState", "train_epoch", "train_step"]

StepFn = Callable[[Any], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class LoopOptions:
    """Options of the loop, the same in all epochs.

    Attributes:
        device: Device of the model; the loop copies each batch to it.
        steps: Number of optimizer steps per epoch; each uses `accumulate` batches of the loader.
        batch_size: Number of images in a batch of one process, to measure images per second.
        seed: Seed of the run, from which all forward passes are seeded.
        dtype: Data type of mixed precision; float32 for none. float16 needs an enabled scaler.
        accumulate: Number of batches whose gradients are averaged for one optimizer step.
        clip_grad: Maximum norm of all gradients together; None does not clip.
        print_freq: Number of optimizer steps between printed metrics.
        console_metrics: Names of the printed metrics; None prints the first ones.
        max_steps: Number of optimizer steps after which the run ends, also within an epoch; None
            for no limit.
        checkpoint_steps: Number of optimizer steps between checkpoints within an epoch; 0 saves
            none.
        output_dir: Folder for the report of a loss that is not finite; None for none.
    """

    device: torch.device
    steps: int
    batch_size: int
    seed: int = 0
    dtype: torch.dtype = torch.float32
    accumulate: int = 1
    clip_grad: float | None = None
    print_freq: int = 50
    console_metrics: Sequence[str] | None = None
    max_steps: int | None = None
    checkpoint_steps: int = 0
    output_dir: Path | None = None

    def last_step(self, epoch: int) -> int:
        """Return the number of optimizer steps at which an epoch ends."""
        if self.max_steps is None:
            return self.steps
        return min(self.steps, self.max_steps - epoch * self.steps)


@dataclass
class TrainState:
    """The objects that training changes, and the position of the run.

    Attributes:
        model: The model, which may be compiled or distributed.
        optimizer: The optimizer of its parameters.
        scaler: The gradient scaler, disabled unless mixed precision uses float16.
        epoch: Number of the current epoch, from 0.
        step: Number of optimizer steps done in the current epoch.
        best: Best value of the metric that selects the best checkpoint.
        evals_since_best: Number of evaluations of whole epochs since the best value.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    epoch: int = 0
    step: int = 0
    best: float = float("-inf")
    evals_since_best: int = 0

    def steps_done(self, steps_per_epoch: int) -> int:
        """Return the number of optimizer steps done in all epochs."""
        return self.epoch * steps_per_epoch + self.step

    def finish_epoch(self) -> None:
        """Move to the next epoch, after the current one is trained and evaluated."""
        self.epoch += 1
        self.step = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint.

        Its `epoch` is the last finished epoch, as in the checkpoints of DeiT and DETR, and -1 if
        there is none. Its `step` is the number of optimizer steps done in the epoch after that.
        """
        return {
            "model": unwrap(self.model).state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch - 1,
            "step": self.step,
            "best": self.best,
            "evals_since_best": self.evals_since_best,
        }

    def load_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load everything but the weights from a checkpoint, which may be one of DeiT or DETR.

        The caller loads the weights.
        """
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        if checkpoint.get("scaler"):
            self.scaler.load_state_dict(checkpoint["scaler"])
        self.epoch = checkpoint["epoch"] + 1
        self.step = checkpoint.get("step", 0)
        self.best = checkpoint.get("best", self.best)
        self.evals_since_best = checkpoint.get("evals_since_best", 0)


def train_epoch(
    step_fn: StepFn,
    loader: Iterable[Any],
    state: TrainState,
    options: LoopOptions,
    *,
    stop: StopRequest,
    log: RunLog,
    on_step: Callable[[], Any] = lambda: None,
    save: Callable[[], Any] = lambda: None,
    left: TimeLeft | None = None,
) -> dict[str, float]:
    """Train from step `state.step` to the end of the epoch, and update `state`.

    With `options.max_steps`, the epoch may end before its last step.

    Args:
        step_fn: Function of a batch on the device that returns scalar tensors: `loss`, which is
            minimized, and other metrics to average and print. It may change the batch in place.
        loader: Yields the batches from step `state.step` on, `options.accumulate` for each step.
        state: Model, optimizer and position.
        options: Options of the loop.
        stop: Request to stop, checked after each optimizer step.
        log: Receives the `train/*` curves when metrics are printed.
        on_step: Called after each optimizer step; `state.step` already counts it.
        save: Saves a checkpoint. All processes call it, only between two optimizer steps.
        left: Time left of the run, to print.

    Returns:
        The metrics that `step_fn` returned, averaged over all processes and all steps of the epoch,
        and `lr`, `images_per_s`, `data_s` (seconds per optimizer step in which this process waited
        for data) and `memory_mb`. If the run was resumed within the epoch, the averages contain
        only the steps since then. If no step was left, the result is empty.

    Raises:
        Stopped: A signal asked the run to stop; its checkpoint is saved.
        NonFiniteLossError: The loss is not finite in some process.
        RuntimeError: The loader ended before the epoch.
    """
    first = shown = state.step
    end = options.last_step(state.epoch)
    # A run that stopped after the last step of the epoch has only the evaluation left.
    if first >= end:
        return {}
    state.model.train()
    total_batch_size = options.batch_size * options.accumulate * world_size()
    meters, speed, left_of_epoch = Meters(options.device), Throughput(), TimeLeft(end, first)
    batches = TimedBatches(loader)
    with Progress(f"epoch {state.epoch}", end, first) as progress:
        while state.step < end:
            meters.update(train_step(step_fn, batches, state, options))
            state.step += 1
            on_step()
            speed.add(total_batch_size)
            progress.advance()
            if state.step % options.print_freq == 0 or state.step == end:
                metrics = meters.averages(all_processes=True, recent=True)
                data_s = batches.recent() / (state.step - shown)
                metrics |= _run_metrics(state, options, speed.recent(), data_s)
                shown, done = state.step, state.steps_done(options.steps)
                log.scalars({f"train/{name}": value for name, value in metrics.items()}, done)
                seconds = [left_of_epoch.seconds(state.step)]
                seconds += [left.seconds(done)] if left is not None else []
                progress.show(
                    step_line(metrics, options.console_metrics, total_batch_size, seconds)
                )
            if options.checkpoint_steps and state.step % options.checkpoint_steps == 0:
                save()
            stop.check(save)
    data_s = batches.total() / (end - first)
    averages = meters.averages(all_processes=True)
    return averages | _run_metrics(state, options, speed.average(), data_s)


def train_step(
    step_fn: StepFn, batches: Iterator[Any], state: TrainState, options: LoopOptions
) -> dict[str, torch.Tensor]:
    """Do one optimizer step on the next `options.accumulate` batches.

    Args:
        step_fn: As in `train_epoch`.
        batches: Iterator over the batches of the epoch.
        state: Model, optimizer and position; the caller counts the step.
        options: Options of the loop.

    Returns:
        The metrics that `step_fn` returned, averaged over the batches, and `grad_norm`, the norm of
        the gradients before clipping (only with clipping, and not for float16).

    Raises:
        NonFiniteLossError: The loss is not finite in some process.
        RuntimeError: The loader has no batch left.
    """

    def forward(batch: Any) -> dict[str, torch.Tensor]:
        with autocast(options.device, options.dtype):
            return step_fn(copy_to(batch, options.device))

    averages: dict[str, torch.Tensor] = {}
    for index in range(options.accumulate):
        batch = next(batches, None)
        if batch is None:
            raise RuntimeError(f"the loader ended at step {state.step} of {options.steps}")
        number = state.step * options.accumulate + index
        seed = derive_seed(options.seed, state.epoch, number, rank())
        seed_all(seed)
        with _gradient_sync(state.model, is_last=index + 1 == options.accumulate):
            metrics = forward(batch)
            is_bad = any_process_later(~metrics["loss"].detach().isfinite())
            state.scaler.scale(metrics["loss"] / options.accumulate).backward()
        # The host waits here for the loss, while a GPU has the backward pass to do. The weights are
        # still those of the forward pass. All processes must agree, because they stop together.
        if is_bad():
            report_nonfinite(
                forward,
                state.model,
                batch,
                metrics,
                seed=seed,
                epoch=state.epoch,
                step=state.step,
                output_dir=options.output_dir,
            )
        for name, value in metrics.items():
            part = value.detach() / options.accumulate
            averages[name] = averages[name] + part if index else part
    norm = optimizer_step(state.optimizer, state.scaler, options.clip_grad)
    # With float16 the norm is infinite in some steps, and so would be its average.
    if norm is not None and not state.scaler.is_enabled():
        averages["grad_norm"] = norm
    return averages


def _gradient_sync(model: nn.Module, is_last: bool) -> AbstractContextManager:
    """Synchronize the gradients of a distributed model only in the last backward pass of a step."""
    return nullcontext() if is_last or not hasattr(model, "no_sync") else model.no_sync()


def _run_metrics(
    state: TrainState, options: LoopOptions, images_per_s: float, data_s: float
) -> dict[str, float]:
    """Return learning rate, speed, waiting time and memory.

    The learning rate is that of the first parameter group; with layer-wise decay, that of the last
    layer, which is not decayed.
    """
    group = max(state.optimizer.param_groups, key=lambda group: group.get("lr_scale", 1.0))
    return {
        "lr": group["lr"],
        "images_per_s": images_per_s,
        "data_s": data_s,
        "memory_mb": peak_memory_mb(options.device),
    }
