"""Stopping in good order: SIGTERM and SIGINT end the run at the next step, after a checkpoint.

A signal only raises a flag. The loop asks at every boundary between two steps, where all processes
agree, save and leave together with the code that shells and schedulers expect: 143 or 130.
"""

import logging
import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

from engine.distributed import barrier, is_main, max_over_processes

logger = logging.getLogger(__name__)


class Stopped(SystemExit):
    """The run ends because it was asked to; the exit code is 128 plus the signal's number."""


class StopRequest:
    """Context manager that turns SIGTERM and SIGINT into a request to stop.

    A SIGINT after a first request raises KeyboardInterrupt at once, for people in a hurry; further
    SIGTERMs change nothing. Outside of the context signals do what they did before; a `StopRequest`
    that is never entered is never requested.
    """

    def __init__(self) -> None:
        self._signal = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested:
            raise KeyboardInterrupt
        self._signal = self._signal or number
        # Not through logging: a handler may run while a log record is being written.
        if is_main():
            os.write(2, b"stopping at the next checkpoint; Ctrl-C leaves at once\n")

    @property
    def requested(self) -> bool:
        """Whether this process was asked to stop; other processes may not know yet."""
        return self._signal != 0

    def agreed(self) -> bool:
        """Whether any process was asked to stop; all processes call this and get one answer."""
        self._signal = max_over_processes(self._signal)
        return self.requested

    def check(self, save: Callable[[], Any]) -> None:
        """At a boundary where a checkpoint can be taken: leaves if any process was asked to.

        All processes call this. They leave together, since a launcher ends those that remain.

        Args:
            save: writes the checkpoint; called in every process.

        Raises:
            Stopped: the run was asked to stop, and its checkpoint is written.
        """
        if self.agreed():
            save()
            barrier()
            logger.info("stopped by %s", signal.Signals(self._signal).name)
            raise Stopped(128 + self._signal)


def shield_worker(worker_id: int) -> None:
    """Keeps signals to the run's process group from a data loader's worker.

    Give it as `worker_init_fn`. Ctrl-C and torchrun signal the whole group; a worker that dies of
    it would take the main process along before its checkpoint is written. The worker still ends
    when its loader or its parent does.
    """
    os.setpgid(0, 0)
