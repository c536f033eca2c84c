"""A clean stop: after a signal to end, the run saves a checkpoint and exits.

The signals are SIGTERM, SIGINT (Ctrl-C), SIGHUP (a closed terminal) and SIGUSR1 (of schedulers). A
signal only sets a flag. Between two optimizer steps, all processes check it together. If it is set
in one of them, all save and exit with the code that shells and schedulers expect: 128 plus the
number of the signal.
"""

import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from engine.distributed import barrier, is_main, max_over_processes, world_size

__all__ = ["StopRequest", "Stopped"]

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
_MESSAGE = b"stopping after the current step or evaluation; press Ctrl-C to stop at once\n"


class Stopped(SystemExit):
    """The run stops after a signal; the exit code is 128 plus the number of the signal."""


class StopRequest:
    """Context manager that turns signals to end into a request to stop.

    A SIGINT after the first signal raises KeyboardInterrupt and so stops at once; other further
    signals have no effect. A signal that is ignored, such as SIGHUP with `nohup`, stays ignored. At
    the end of the context the old signal handlers are restored.
    """

    def __init__(self) -> None:
        self._signal = 0
        self._at_once = False
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in _SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                self._handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Store the first signal, or interrupt the run at a later SIGINT."""
        if number == signal.SIGINT and self.requested:
            raise KeyboardInterrupt
        self._signal = self._signal or number
        # Logging is not safe here: the signal may have interrupted it.
        # The terminal may be closed.
        with suppress(OSError):
            if is_main():
                os.write(2, _MESSAGE)
        self._stop_if_alone()

    def _stop_if_alone(self) -> None:
        """Stop now if a signal was received in a context of `at_once`."""
        if self._at_once and self.requested and world_size() == 1:
            raise Stopped(128 + self._signal)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Let a signal end a single process at once; use it when the state is saved.

        Several processes stop only together, at the next `check`.

        Raises:
            Stopped: A signal was received.
        """
        self._at_once = True
        try:
            self._stop_if_alone()
            yield
        finally:
            self._at_once = False

    @property
    def requested(self) -> bool:
        """Whether this process has received a signal."""
        return self._signal != 0

    def agreed(self) -> bool:
        """Return whether any process has received a signal; all processes must call this."""
        self._signal = max_over_processes(self._signal)
        return self.requested

    def check(self, save: Callable[[], Any]) -> None:
        """Save a checkpoint and stop, if any process has received a signal.

        All processes must call this, between two optimizer steps. They exit together, since a
        launcher ends the others when one exits.

        Args:
            save: Saves the checkpoint; all processes call it.

        Raises:
            Stopped: A signal was received, and the checkpoint is saved.
        """
        if self.agreed():
            save()
            barrier()
            logger.info("stopped by %s", signal.Signals(self._signal).name)
            raise Stopped(128 + self._signal)
