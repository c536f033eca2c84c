"""Workers of a data loader that have died: one sentence, and only where a batch is awaited.

torch raises the error of a dead worker in its handler of SIGCHLD, at any place of the program.
Between the updates of two parameters, the state of the training could not be saved any more.
"""

import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from engine.errors import UserError

__all__ = ["WorkerError", "awaited_batch", "shield_worker", "worker_error"]

_DEAD = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (.*)", re.DOTALL)
_NO_SHARED_MEMORY = re.compile(r"unable to \w+ (?:shared memory|to file|file) ?.*</torch_")
_CANNOT_SEND = 28  # Exit code of a worker.
_ADVICE = (
    "shared memory is too small (df -h /dev/shm): give the container more, as by docker run "
    "--shm-size 8g, or use --num-workers 0"
)


class WorkerError(UserError):
    """A worker of a data loader has died, or has too little shared memory."""


def worker_error(error: BaseException) -> WorkerError | None:
    """Return an error of torch about a worker in one sentence; None for another error."""
    # The cause of torch's error has the signal or the exit code.
    text = f"{error.__cause__}\n{error}"
    if _NO_SHARED_MEMORY.search(text):
        return WorkerError(f"a data loading process cannot send its batch: {_ADVICE}")
    dead = _DEAD.search(text)
    if dead is not None:
        process, end = f"the data loading process {dead[1]}", dead[2]
    elif isinstance(error, (EOFError, ConnectionError)) and "DataLoader worker" not in text:
        # The worker died while it sent a batch.
        process, end = "a data loading process", ""
    else:
        return None
    if "Bus error" in end or f"exit code {_CANNOT_SEND}." in end:
        return WorkerError(f"{process} cannot send its batch: {_ADVICE}")
    how = re.match(r"is killed by signal: ([^.]+)", end)
    cause = how[1].strip() if how else "without a signal"
    return WorkerError(
        f"{process} ended unexpectedly ({cause}); if memory ran out, use fewer --num-workers or a "
        "smaller --batch-size"
    )


class _Deferred:
    """A handler of SIGCHLD that calls torch's only while a batch is awaited."""

    def __init__(self, handler: Callable[[int, Any], Any]) -> None:
        self._handler = handler
        self.is_awaited = False

    def __call__(self, number: int, frame: Any) -> None:
        """Handle the signal."""
        if self.is_awaited:
            self._handler(number, frame)


@contextmanager
def awaited_batch() -> Iterator[None]:
    """Wait for a batch of a data loader; from its first use on, workers fail only in here.

    Raises:
        WorkerError: A worker has died, now or before, or has too little shared memory.
    """
    handler = _deferred() if threading.current_thread() is threading.main_thread() else None
    try:
        if handler is not None:
            handler.is_awaited = True
            handler(signal.SIGCHLD, None)
        yield
    except (RuntimeError, EOFError, ConnectionError) as error:
        found = worker_error(error)
        if found is None:
            raise
        raise found from error
    finally:
        if handler is not None:
            handler.is_awaited = False


def _deferred() -> _Deferred | None:
    """Put a deferred handler in front of torch's; None if torch has set none."""
    handler = signal.getsignal(signal.SIGCHLD)
    if getattr(handler, "__module__", "").startswith("torch.utils.data"):
        handler = _Deferred(handler)
        signal.signal(signal.SIGCHLD, handler)
    return handler if isinstance(handler, _Deferred) else None


def shield_worker(worker_id: int) -> None:
    """Prepare a worker of a data loader; use it as `worker_init_fn`.

    The worker moves to its own process group, away from the run's signals: Ctrl-C and torchrun send
    signals to the whole process group, and a worker that dies from one would end the main process
    before it has saved its checkpoint. The worker still exits with its loader or its parent.

    A worker that cannot send a batch exits, for example without shared memory. Without this, the
    main process would wait for the batch forever.

    A worker prints nothing if the main process ends while it takes a batch.

    Args:
        worker_id: Number of the worker; not used.
    """
    from multiprocessing.queues import Queue

    os.setpgid(0, 0)
    Queue._on_queue_feeder_error = staticmethod(_exit_without_sending)
    # multiprocessing serves the memory of batches in a thread that calls this hook.
    sys.excepthook = _print_unless_closed


def _print_unless_closed(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print an exception, unless the other end has closed the connection."""
    if not isinstance(error, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


def _exit_without_sending(error: Exception, batch: object) -> None:
    """Exit a worker that cannot send its batch."""
    os.write(2, f"a data loading process cannot send its batch: {error}\n".encode())
    os._exit(_CANNOT_SEND)
