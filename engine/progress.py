"""Progress within an epoch: a bar on a terminal, plain log lines anywhere else."""

import logging
import sys
from collections.abc import Mapping

from tqdm import tqdm

from engine.distributed import is_main

logger = logging.getLogger(__name__)


class Progress:
    """Shows the steps of an epoch; in processes other than the main one, nothing.

    Args:
        title: what is counted, such as `epoch 3`.
        total: number of steps.
        done: steps that were done before, by the run that is resumed.
    """

    def __init__(self, title: str, total: int, done: int = 0) -> None:
        self._title, self._total, self._done = title, total, done
        self._bar = None
        if is_main() and sys.stdout.isatty():
            self._bar = tqdm(
                desc=title, total=total, initial=done, file=sys.stdout, dynamic_ncols=True
            )

    def advance(self) -> None:
        """Counts a step."""
        self._done += 1
        if self._bar is not None:
            self._bar.update()

    def show(self, figures: Mapping[str, float]) -> None:
        """Shows figures beside the bar, or logs them as a line."""
        text = "  ".join(f"{name} {_short(value)}" for name, value in figures.items())
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
    return f"{value:.0f}" if 1000 <= value < 1e9 else f"{value:.4g}"
