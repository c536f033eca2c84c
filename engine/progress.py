"""Progress within an epoch: a progress bar on a terminal, log lines anywhere else."""

import logging
import sys
from collections.abc import Mapping

from tqdm import tqdm

from engine.distributed import is_main

__all__ = ["Progress"]

logger = logging.getLogger(__name__)


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
            self._bar = tqdm(
                desc=title, total=total, initial=done, file=sys.stdout, dynamic_ncols=True
            )

    def advance(self) -> None:
        """Count one step."""
        self._done += 1
        if self._bar is not None:
            self._bar.update()

    def show(self, metrics: Mapping[str, float]) -> None:
        """Show metrics in the bar, or log them as one line."""
        text = "  ".join(f"{name} {_short(value)}" for name, value in metrics.items())
        if self._bar is not None:
            self._bar.set_postfix_str(text)
        elif is_main():
            logger.info("%s  step %d/%d  %s", self._title, self._done, self._total, text)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()


def _short(value: float) -> str:
    """Format a number: from 1000 on without decimals, else with four significant digits."""
    return f"{value:.0f}" if 1000 <= value < 1e9 else f"{value:.4g}"
