"""The epochs of a training: train, evaluate, step the schedule, log, save, stop if asked to."""

import logging
from collections.abc import Callable
from typing import Any

from torch.utils.data import DataLoader

from engine.logging import RunLog
from engine.loop import LoopOptions, StepFn, TrainState, train_epoch
from engine.signals import StopRequest

__all__ = ["fit"]

logger = logging.getLogger(__name__)


def fit(
    step_fn: StepFn,
    loader: DataLoader,
    state: TrainState,
    options: LoopOptions,
    *,
    epochs: int,
    eval_interval: int,
    evaluate: Callable[[], dict[str, float]],
    best_by: str,
    step_schedule: Callable[[int, float], Any],
    save: Callable[..., Any],
    facts: dict[str, Any],
    on_step: Callable[[], Any] = lambda: None,
) -> None:
    """Train from where `state` stands to the end.

    Args:
        step_fn: As for `train_epoch`.
        loader: Its sampler has `set_epoch(epoch, start)`, `start` in samples of this process.
        state: What is trained.
        options: How.
        epochs: Where to end.
        eval_interval: Epochs from one evaluation to the next; the last epoch is always evaluated.
        evaluate: Gives the figures of an epoch, in every process alike.
        best_by: Which of them is to be as large as possible.
        step_schedule: Called with the finished epoch and the best such figure so far.
        save: Writes a checkpoint; takes `is_best` and, after an epoch, its number as `epoch`.
        facts: What every line of the log repeats, such as `n_parameters`.
        on_step: As for `train_epoch`.

    Raises:
        Stopped: The run was asked to stop; its checkpoint is written.
        NonFiniteLossError: The loss is not finite in some process.
    """
    done = state.epoch * options.steps + state.step
    with StopRequest() as stop, RunLog(options.output_dir, start_step=done) as log:
        while state.epoch < epochs:
            epoch = state.epoch
            start = state.step * options.batch_size * options.accumulate
            loader.sampler.set_epoch(epoch, start=start)
            trained = train_epoch(
                step_fn, loader, state, options, stop=stop, log=log, on_step=on_step, save=save
            )
            due = (epoch + 1) % eval_interval == 0 or epoch + 1 == epochs
            tested = evaluate() if due else {}
            is_best = due and tested[best_by] > state.best
            state.best = max(state.best, tested.get(best_by, state.best))
            step_schedule(epoch, state.best)
            state.finish_epoch()
            record = {"epoch": epoch, **facts}
            record |= {f"train_{name}": value for name, value in trained.items()}
            record |= {f"test_{name}": value for name, value in tested.items()}
            log.write_epoch(record, state.epoch * options.steps)
            save(is_best=is_best, epoch=epoch)
            if due:
                figures = "  ".join(f"{name} {value:.6g}" for name, value in tested.items())
                logger.info("epoch %d: %s  (best %s %.6g)", epoch, figures, best_by, state.best)
            stop.check(save)
