"""A process that runs checks, seen from the parent: an endless loop or a crash ends only it."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO

__all__ = ["ROOT", "WORKER", "Client", "NoReplyError"]

ROOT = Path(__file__).parents[3]
WORKER = (sys.executable, "-m", "scripts.benchmark.gpu.worker")


class NoReplyError(Exception):
    """Error for a process that ended or was too slow.

    Attributes:
        late: Whether the process was too slow.
    """

    def __init__(self, message: str, *, late: bool) -> None:
        super().__init__(message)
        self.late = late


class Client:
    """A process that answers one request per line.

    Args:
        command: The command of the process.
        environment: Variables in addition to those of this process.
        log: File for everything that the process prints.
    """

    def __init__(self, command: Sequence[str], environment: dict[str, str], log: IO[bytes]) -> None:
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            # The processes that a check starts are in the same group and are ended with it.
            start_new_session=True,
        )

    def ask(self, timeout: float, **request) -> dict:
        """Return the reply to a request.

        Raises:
            NoReplyError: The process ended, or had to be ended after `timeout` seconds.
        """
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], max(timeout, 0.0))
        if not ready:
            self.close()
            raise NoReplyError(f"no result after {timeout:.0f} s", late=True)
        line = self.process.stdout.readline()
        if not line.endswith(b"\n"):
            self.close()
            raise NoReplyError(f"the process ended with {self._ending()}", late=False)
        return json.loads(line)

    def _ending(self) -> str:
        """Return the signal or the exit status of the ended process."""
        status = self.process.returncode
        return signal.Signals(-status).name if status < 0 else f"exit status {status}"

    def close(self) -> None:
        """End the process and all that it started."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            # A process that ended by itself has its own exit status.
            self.process.wait(0.2)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
