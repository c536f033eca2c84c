"""The outer frame of a command: one line and an exit code for an error that the user can fix.

| `main` raises                                 | printed on stderr            | exit code      |
|-----------------------------------------------|------------------------------|----------------|
| nothing                                       |                              | 0              |
| `UsageError`                                  | `error: <sentence>`          | 2              |
| `UserError` or an expected exception          | `error: <sentence>`          | 1              |
| an exception whose class has an `exit_code`   | `error: <sentence>`          | `exit_code`    |
| `engine.signals.Stopped`                      |                              | 128 + signal   |
| `KeyboardInterrupt`                           | `error: interrupted`         | 130            |
| `BrokenPipeError` of stdout, as after `head`  |                              | 141            |
| anything else                                 | traceback                    | 1              |

The packages below the trainers do not import this one. Their errors for the user, such as
`datasets.DataError`, have an `exit_code` instead of the base class `UserError`.

With several processes, each process that fails prints its own line, which begins with its rank, as
in `error [rank 3]:`. torchrun shows the sentence in its report, too.
"""

import errno
import json
import logging
import os
import re
import select
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from engine.errors import UserError
from engine.launcher import launched_as
from engine.workers import worker_error

__all__ = ["fail", "one_line", "run"]

_BROKEN_PIPE = 141  # As if SIGPIPE had ended the process.
# In the errors of gloo, NCCL and their store.
_CONNECTION = re.compile(r"connection|socket|nccl|gloo|broken pipe", re.IGNORECASE)
_WORKER_TRACEBACK = "Original Traceback (most recent call last):"


def run(main: Callable[[], Any], *expected: type[Exception]) -> NoReturn:
    """Run a command and exit the process with its exit code.

    Example: `if __name__ == "__main__": cli.run(main)`.

    Args:
        main: The command. It parses its flags itself; its return value is ignored.
        *expected: Further exceptions that the user can fix; their exit code is 1.

    Raises:
        SystemExit: Always, except when `main` raises an unexpected exception.
    """
    try:
        try:
            main()
        except SystemExit:  # After --help.
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except BrokenPipeError:
        if not _stdout_is_closed():
            raise
        # The text in the buffer cannot be written, also not at the exit of the interpreter.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _exit(_BROKEN_PIPE)
    except KeyboardInterrupt:
        fail(_InterruptError("interrupted"))
    except SystemExit:
        _shutdown()
        raise
    except Exception as error:
        explained = _explained(error)
        if explained is not None:
            fail(explained)
        if not isinstance(error, expected) and not hasattr(type(error), "exit_code"):
            raise
        fail(error)
    _shutdown()
    sys.exit(0)


def fail(error: Exception) -> NoReturn:
    """Print an error as one line on stderr and exit with its exit code, 1 if it has none."""
    rank, _, world_size = launched_as()
    place = f" [rank {rank}]" if world_size > 1 else ""
    sentence = one_line(error)
    _report_to_torchrun(sentence)
    # A single write keeps the lines of several processes separate.
    sys.stderr.write(f"error{place}: {sentence}\n")
    sys.stderr.flush()
    _exit(getattr(error, "exit_code", 1))


def _exit(code: int) -> NoReturn:
    """Exit without shutting down the process group.

    The shutdown would wait for the other processes, which may wait for this one in a collective.
    The launcher ends them after this process has exited.
    """
    distributed = _distributed()
    if distributed is not None and distributed.in_process_group():
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


def _report_to_torchrun(sentence: str) -> None:
    """Write the sentence to the error file of this process, in the format of `torch.distributed`.

    The format is that of `torch.distributed.elastic.multiprocessing.errors`. Without a traceback
    in it, torchrun shows the sentence.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    details = {"message": sentence, "extraInfo": {"timestamp": str(int(time.time()))}}
    # The error is on stderr in any case.
    with suppress(OSError):
        Path(path).write_text(json.dumps({"message": details}), encoding="utf-8")


def _stdout_is_closed() -> bool:
    """Return whether nobody reads the pipe that stdout is; other pipes may be broken, too."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    return bool(poll.poll(0))


def _explained(error: Exception) -> UserError | None:
    """Return the sentence for an error of a long path or of another process; None for others."""
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return UserError(f"a path must be short enough for the system, got {error.filename:.100}…")
    distributed = _distributed()
    if not isinstance(error, RuntimeError) or isinstance(error, UserError):
        return None
    if distributed is not None and _CONNECTION.search(str(error)):
        lost = distributed.lost_ranks()
        if lost:
            names = ", ".join(f"{rank} (process {process})" for rank, process in lost.items())
            return UserError(
                f"rank {names} has ended: see its error, or the log of the system if it was "
                "killed; start again with --auto-resume to continue from the last checkpoint"
            )
    return worker_error(error)


def _distributed() -> ModuleType | None:
    """Return `engine.distributed`, or None before its import, which would import torch."""
    return sys.modules.get("engine.distributed")


def _shutdown() -> None:
    """Leave the process group, if there is one."""
    distributed = _distributed()
    if distributed is not None:
        distributed.shutdown()


class _InterruptError(UserError):
    """An interrupt from the keyboard."""

    exit_code = 130
