"""The outer frame of a command: one line and an exit code for an error that the user can fix.

| `main` raises                           | printed on stderr                  | exit code      |
|-----------------------------------------|------------------------------------|----------------|
| nothing                                 |                                    | 0              |
| `UsageError`                            | `error: <sentence>`                | 2              |
| `UserError` or an expected exception    | `error: <sentence>`                | 1              |
| `engine.signals.Stopped`                |                                    | 128 + signal   |
| `KeyboardInterrupt`                     | `error: interrupted`               | 130            |
| anything else                           | traceback                          | 1              |

With several processes, each process that fails prints its own line, which begins with its rank, as
in `error [rank 3]:`.
"""

import logging
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from engine.distributed import in_process_group, launched_as, shutdown
from engine.errors import UserError

__all__ = ["fail", "one_line", "run"]

_WORKER_TRACEBACK = "Original Traceback (most recent call last):"


def run(main: Callable[[], Any], *expected: type[Exception]) -> NoReturn:
    """Run a command and exit the process with its exit code.

    Example: `if __name__ == "__main__": cli.run(main, DataError)`.

    Args:
        main: The command. It parses its flags itself; its return value is ignored.
        *expected: Exceptions of other packages that the user can fix, like `UserError`.

    Raises:
        SystemExit: Always, except when `main` raises an unexpected exception.
    """
    try:
        main()
    except (UserError, *expected) as error:
        # Do not shut down the process group: it would wait for the other processes, which may wait
        # for this one in a collective. The launcher ends them after this process has exited.
        fail(error)
    except KeyboardInterrupt:
        fail(_InterruptError("interrupted"))
    except SystemExit:
        shutdown()
        raise
    shutdown()
    sys.exit(0)


def fail(error: Exception) -> NoReturn:
    """Print an error as one line on stderr and exit with its exit code, 1 if it has none."""
    rank, _, world_size = launched_as()
    place = f" [rank {rank}]" if world_size > 1 else ""
    # A single write keeps the lines of several processes separate.
    sys.stderr.write(f"error{place}: {one_line(error)}\n")
    sys.stderr.flush()
    code = getattr(error, "exit_code", 1)
    if in_process_group():
        # Threads of the process group still run. The interpreter's own exit could abort on them,
        # and the exit code would be lost.
        logging.shutdown()
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def one_line(error: Exception) -> str:
    """Return the message of an error without line breaks and without a worker's traceback.

    An exception from a data loader's worker has the whole traceback of the worker as its message.
    The original message is in its last line, after the name of the exception.
    """
    text = str(error).strip()
    if _WORKER_TRACEBACK in text:
        text = text.splitlines()[-1].partition(": ")[2]
    return " ".join(text.split()) or type(error).__name__


class _InterruptError(UserError):
    """An interrupt from the keyboard."""

    exit_code = 130
