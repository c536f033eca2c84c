"""The training loop: one epoch of any model on any data, given a function for one step.

For every step: fetch, seed, forward, check, backward, and after `accumulate` such batches clip and
update. Then, at the boundary between two steps, a callback for what follows an update (EMA,
schedule), the figures if it is time to print, a checkpoint if one is due, and the question whether
to stop. Checkpoints are taken only there.

Resumption is exact without saving any generator's state: each forward pass is seeded from (seed,
epoch, batch, rank), so a run that continues at step s draws what the unbroken run drew. The loader
has to do the same for its samples and to begin with the batch of step s.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.distributed import any_process, rank, world_size
from engine.logging import RunLog
from engine.meters import Meters, Throughput, peak_memory_mb
from engine.nonfinite import report_nonfinite
from engine.optim import autocast, optimizer_step
from engine.progress import Progress
from engine.seeding import derive_seed, seed_all
from engine.signals import StopRequest
from engine.tensors import copy_to, unwrap

StepFn = Callable[[Any], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class LoopOptions:
    """What stays the same from epoch to epoch."""

    device: torch.device
    steps: int
    """Optimizer steps per epoch; each takes `accumulate` batches from the loader."""
    batch_size: int
    """Images in a batch of one process, to count images/s."""
    seed: int = 0
    dtype: torch.dtype = torch.float32
    """Autocast's type; float32 is none. float16 wants a scaler that is switched on."""
    accumulate: int = 1
    clip_grad: float | None = None
    """Largest norm of all gradients together."""
    print_freq: int = 50
    """Steps between two lines of figures."""
    checkpoint_steps: int = 0
    """Steps between two checkpoints within an epoch; 0 takes none."""
    output_dir: Path | None = None
    """Where the report on a loss that is not finite goes."""


@dataclass
class TrainState:
    """What training changes, and how far it has come.

    `epoch` is the epoch that is running, `step` the number of optimizer steps done in it, `best`
    the best figure of an evaluation so far.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    epoch: int = 0
    step: int = 0
    best: float = float("-inf")

    def finish_epoch(self) -> None:
        """Moves on to the next epoch: call it when this one is trained and evaluated."""
        self.epoch += 1
        self.step = 0

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs of it.

        As in the originals' checkpoints, `epoch` is the last one that is finished (-1 before);
        `step` counts the steps done since, in the epoch after it.
        """
        return {
            "model": unwrap(self.model).state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch - 1,
            "step": self.step,
            "best": self.best,
        }

    def load_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Restores all but the model's weights from a checkpoint, the originals' included.

        Weights are left to the caller, who knows how to explain a mismatch.
        """
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        if checkpoint.get("scaler"):
            self.scaler.load_state_dict(checkpoint["scaler"])
        self.epoch = checkpoint["epoch"] + 1
        self.step = checkpoint.get("step", 0)
        self.best = checkpoint.get("best", self.best)


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
) -> dict[str, float]:
    """Trains from `state.step` to the end of the epoch; `state` moves along.

    Args:
        step_fn: takes a batch on the device, its own to change, and returns scalar tensors: `loss`,
            which is differentiated, and others to be averaged and shown.
        loader: gives the batches from step `state.step` on, `options.accumulate` for each step.
        state: what is trained.
        options: how.
        stop: asked after every step.
        log: gets `train/*` curves whenever figures are printed.
        on_step: called after every optimizer step, with `state.step` counting it.
        save: writes a checkpoint; called in every process, at boundaries between steps alone.

    Returns:
        Averages over all processes and the epoch's steps of what `step_fn` returned, and `lr`,
        `images_per_s` and `memory_mb`. After a resumption in mid-epoch they cover only the steps
        done since, and are empty where none was left: the weights are exact, these figures are not.

    Raises:
        Stopped: the run was asked to stop; its checkpoint is written.
        NonFiniteLossError: the loss is not finite in some process.
        RuntimeError: the loader ended before the epoch did.
    """
    if state.step >= options.steps:  # trained before, and only not yet evaluated
        return {}
    state.model.train()
    meters, speed = Meters(options.device), Throughput()
    images_per_step = options.batch_size * options.accumulate * world_size()
    batches = iter(loader)
    with Progress(f"epoch {state.epoch}", options.steps, state.step) as progress:
        while state.step < options.steps:
            meters.update(train_step(step_fn, batches, state, options))
            state.step += 1
            on_step()
            speed.add(images_per_step)
            progress.advance()
            if state.step % options.print_freq == 0 or state.step == options.steps:
                figures = meters.averages(all_processes=True, recent=True)
                figures |= _conditions(state, options, speed.recent())
                progress.show(figures)
                curves = {f"train/{name}": value for name, value in figures.items()}
                log.scalars(curves, state.epoch * options.steps + state.step)
            if options.checkpoint_steps and state.step % options.checkpoint_steps == 0:
                save()
            stop.check(save)
    return meters.averages(all_processes=True) | _conditions(state, options, speed.average())


def train_step(
    step_fn: StepFn, batches: Iterator[Any], state: TrainState, options: LoopOptions
) -> dict[str, torch.Tensor]:
    """Does one optimizer step on the next `accumulate` batches and returns their mean figures."""

    def forward(batch: Any) -> dict[str, torch.Tensor]:
        with autocast(options.device, options.dtype):
            return step_fn(copy_to(batch, options.device))

    total: dict[str, torch.Tensor] = {}
    for micro in range(options.accumulate):
        batch = next(batches, None)
        if batch is None:
            raise RuntimeError(f"the loader ended at step {state.step} of {options.steps}")
        number = state.step * options.accumulate + micro
        seed = derive_seed(options.seed, state.epoch, number, rank())
        seed_all(seed)
        with _gradient_sync(state.model, last=micro + 1 == options.accumulate):
            figures = forward(batch)
            # Before the backward pass: it keeps a GPU busy while the host, which waits here for the
            # verdict, catches up. And it must be all processes that turn back, or none.
            if any_process(~figures["loss"].detach().isfinite()):
                report_nonfinite(
                    forward,
                    state.model,
                    batch,
                    figures,
                    seed=seed,
                    epoch=state.epoch,
                    step=state.step,
                    output_dir=options.output_dir,
                )
            state.scaler.scale(figures["loss"] / options.accumulate).backward()
        for name, value in figures.items():
            part = value.detach() / options.accumulate
            total[name] = total[name] + part if micro else part
    norm = optimizer_step(state.optimizer, state.scaler, options.clip_grad)
    if norm is not None and not state.scaler.is_enabled():  # float16's overflows now and then
        total["grad_norm"] = norm
    return total


def _gradient_sync(model: nn.Module, last: bool) -> Any:
    """Lets a distributed model exchange gradients only in the last backward pass of a step."""
    return nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync()


def _conditions(state: TrainState, options: LoopOptions, rate: float) -> dict[str, float]:
    """Figures of the run itself: learning rate (of the first group), speed and memory."""
    return {
        "lr": state.optimizer.param_groups[0]["lr"],
        "images_per_s": rate,
        "memory_mb": peak_memory_mb(options.device),
    }
