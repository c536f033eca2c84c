"""The outermost frame of a command: one line and an exit code for what the user can mend.

| what leaves `main`                      | on stderr                          | exit code      |
|-----------------------------------------|------------------------------------|----------------|
| nothing                                 |                                    | 0              |
| `UsageError`                            | `error: <sentence>`                | 2              |
| `UserError`, any type said to be expected | `error: <sentence>`              | 1              |
| `engine.signals.Stopped`                |                                    | 143 or 130     |
| `KeyboardInterrupt`                     | `error: interrupted`               | 130            |
| anything else                           | its traceback                      | 1              |

With several processes the line begins with `error [rank 3]:`, in each of those that fail.
"""

import sys
from collections.abc import Callable
from typing import Any, NoReturn

from engine.distributed import launched_as, shutdown
from engine.errors import UserError

_WORKER_TRACEBACK = "Original Traceback (most recent call last):"


def run(main: Callable[[], Any], *expected: type[Exception]) -> NoReturn:
    """Runs a command and leaves the process with its exit code.

    Use it as `if __name__ == "__main__": cli.run(main, DataError)`.

    Args:
        main: the command; it reads its flags itself, and what it returns is ignored.
        expected: exceptions of other packages that are the user's to mend, like `UserError`.

    Raises:
        SystemExit: always, unless an unexpected exception passes through.
    """
    try:
        main()
    except (UserError, *expected) as error:
        # The process group is left as it is: fellows may be waiting in a collective, and leaving in
        # good order would wait for them. The launcher ends them when this process has gone.
        fail(error)
    except KeyboardInterrupt:
        fail(_InterruptError("interrupted"))
    except SystemExit:
        shutdown()
        raise
    shutdown()
    sys.exit(0)


def fail(error: Exception) -> NoReturn:
    """Prints the error as one line on stderr and leaves with its exit code (1 if it has none)."""
    rank, _, world_size = launched_as()
    place = f" [rank {rank}]" if world_size > 1 else ""
    # One write, so that the lines of several processes do not run into each other.
    sys.stderr.write(f"error{place}: {one_line(error)}\n")
    sys.stderr.flush()
    sys.exit(getattr(error, "exit_code", 1))


def one_line(error: Exception) -> str:
    """The error's sentence, freed of line breaks and of a data loader's traceback.

    An exception that crosses over from a loader's worker comes with the worker's whole traceback
    as its text; the sentence stands at the end, after the exception's name.
    """
    text = str(error).strip()
    if _WORKER_TRACEBACK in text:
        text = text.splitlines()[-1].partition(": ")[2]
    return " ".join(text.split()) or type(error).__name__


class _InterruptError(UserError):
    exit_code = 130
