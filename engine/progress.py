"""Progress within an epoch: one short line on a terminal, log lines anywhere else.

The lines contain the main metrics only. `log.txt` and the loggers get all of them.
"""

import logging
import sys
from collections.abc import Mapping, Sequence

from tqdm import tqdm

from engine.distributed import is_main

__all__ = ["Progress", "duration", "short_metrics", "step_line"]

logger = logging.getLogger(__name__)

# Number of metrics to show if a trainer does not name them.
_SHOWN = 4
_RUN_METRICS = ("lr", "images_per_s", "data_s", "memory_mb")


class Progress:
    """Context manager that shows the steps of an epoch, in the main process only.

    Args:
        title: Title of the bar or the lines, such as `epoch 3`.
        total: Number of steps.
        done: Number of steps done before, if the run is resumed.
    """

    def __init__(self, title: str, total: int, done: int = 0) -> None:
        self._title, self._total, self._done = title, total, done
        self._bar = None
        if is_main() and sys.stdout.isatty():
            # The bar gets the columns that the text leaves; tqdm cuts longer text at the right.
            form = f"{title} {{n_fmt}}/{{total_fmt}} |{{bar}}| {{desc}}"
            self._bar = tqdm(
                total=total, initial=done, file=sys.stdout, dynamic_ncols=True, bar_format=form
            )

    def advance(self) -> None:
        """Count one step."""
        self._done += 1
        if self._bar is not None:
            self._bar.update()

    def show(self, text: str) -> None:
        """Show a text in the bar, or log it as one line."""
        if self._bar is not None:
            self._bar.set_description_str(text)
        elif is_main():
            logger.info("%s %d/%d  %s", self._title, self._done, self._total, text)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()


def step_line(
    metrics: Mapping[str, float],
    names: Sequence[str] | None,
    total_batch_size: int,
    seconds_left: Sequence[float],
) -> str:
    """Format the metrics of the last steps as one line.

    Args:
        metrics: All metrics, with `lr`, `images_per_s` and `data_s`.
        names: Names of the other metrics to show; None for the first ones.
        total_batch_size: Number of images per optimizer step.
        seconds_left: Seconds left of the epoch and, if they are known, of the run.
    """
    own = {name: value for name, value in metrics.items() if name not in _RUN_METRICS}
    images_per_s = metrics["images_per_s"]
    waiting = metrics["data_s"] * images_per_s / total_batch_size
    left = [duration(seconds) for seconds in seconds_left]
    parts = [
        short_metrics(own, names),
        f"lr {metrics['lr']:.3g}",
        f"{images_per_s:.3g} img/s" if images_per_s < 1000 else f"{images_per_s:.0f} img/s",
        f"data {waiting:.0%}",
        f"left {left[0]}" + "".join(f" (run {time})" for time in left[1:]),
    ]
    return "  ".join(parts)


def short_metrics(metrics: Mapping[str, float], names: Sequence[str] | None = None) -> str:
    """Format the named metrics in one line, without those that are missing.

    Args:
        metrics: Values by name.
        names: Names in their order; None for the first ones.
    """
    shown = list(metrics)[:_SHOWN] if names is None else [name for name in names if name in metrics]
    return "  ".join(f"{name} {_short(metrics[name])}" for name in shown)


def _short(value: float) -> str:
    """Format a number: from 1000 on without decimals, else with four significant digits."""
    return f"{value:.0f}" if 1000 <= value < 1e9 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """Format seconds as `2:05`, `3:02:05` or `4d 03h`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d {hours % 24:02d}h"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
