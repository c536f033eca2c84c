"""The processes of cells: their commands, output and end."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from engine import UsageError, UserError
from engine.folder_lock import FolderInUseError, lock_folder

__all__ = ["CellError", "Launcher", "Processes", "StoppedError"]

_ROOT = Path(__file__).parents[2]
_ERROR = re.compile(r"^error(?: \[rank \d+\])?: (.+)$", re.MULTILINE)
_WAIT = 0.5  # seconds between two looks at the lock of another process


class CellError(UserError):
    """A process of a cell failed."""


class StoppedError(Exception):
    """The ablation was asked to stop."""


class Launcher:
    """The words before the module in the command of a cell.

    Args:
        words: Command that replaces `python`, such as `torchrun --nproc_per_node=8`; empty for
            this Python.
        jobs: Number of cells at once.

    Raises:
        UsageError: The command does not exist.
    """

    def __init__(self, words: str, jobs: int) -> None:
        try:
            self.words = shlex.split(words) or [sys.executable]
        except ValueError as error:
            raise UsageError(f"--launcher must be a command, got {words!r}: {error}") from error
        # torchrun is in the folder of this Python, also if its environment is not activated.
        own = str(Path(sys.executable).parent)
        found = shutil.which(self.words[0]) or shutil.which(self.words[0], path=own)
        if found is None:
            raise UsageError(f"--launcher must be a command, got {self.words[0]!r}: not found")
        self.words[0] = found
        self._is_torchrun = any(
            Path(word).name in ("torchrun", "torch.distributed.run") for word in self.words
        )
        own_port = re.compile(r"--(standalone|rdzv|master|nnodes)")
        if self._is_torchrun and not any(own_port.match(word) for word in self.words):
            # Each process group gets a free port.
            self.words.append("--standalone")
        self._jobs = jobs

    def command(self, module: str, *arguments: str) -> list[str]:
        """Return the command of a module."""
        return [*self.words, "-m", module, *arguments]

    def environment(self) -> dict[str, str]:
        """Return the environment of the cells, which share the cores.

        torchrun sets the number of threads itself.
        """
        env = dict(os.environ)
        search = [str(_ROOT), *filter(None, [env.get("PYTHONPATH")])]
        env["PYTHONPATH"] = os.pathsep.join(search)
        if not self._is_torchrun:
            count = getattr(os, "sched_getaffinity", None)
            cores = len(count(0)) if count else os.cpu_count() or 1
            env.setdefault("OMP_NUM_THREADS", str(max(1, cores // self._jobs)))
        return env


class Processes:
    """The processes that run now; a signal ends them all."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self._running: set[subprocess.Popen] = set()
        self._signal = 0

    @property
    def signal(self) -> int:
        """Number of the first signal, 0 if there was none."""
        return self._signal

    def stop(self, number: int) -> None:
        """Ask all processes to save and end; after a second Ctrl-C, to end at once."""
        again = bool(self._signal)
        self._signal = self._signal or number
        for process in list(self._running):
            with suppress(ProcessLookupError):
                if not again:
                    process.send_signal(signal.SIGTERM)
                elif number == signal.SIGINT:
                    process.send_signal(signal.SIGINT)

    def run(self, log: Path, module: str, *arguments: str) -> None:
        """Run a module until it ends; its output is appended to a file.

        Raises:
            CellError: It failed; the message is its last error.
            StoppedError: The ablation was asked to stop.
        """
        command = self._launcher.command(module, *arguments)
        with log.open("ab") as file:
            start = file.tell()
            file.write(f"$ {shlex.join(command)}\n".encode())
            file.flush()
            self.check()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=self._launcher.environment(),
                # Ctrl-C in a terminal reaches only this command, which forwards it once.
                start_new_session=True,
            )
            self._running.add(process)
            if self._signal:  # It arrived while the process was started.
                process.terminate()
            code = process.wait()
            self._running.discard(process)
        if code == 0:
            return
        self.check()
        raise CellError(_reason(log, start, code))

    def check(self) -> None:
        """Raise StoppedError after a signal."""
        if self._signal:
            raise StoppedError

    def wait_for_others(self, folders: Sequence[Path], name: str) -> None:
        """Wait until no process of another command works in the folders of a cell.

        Such a process was started by a command that was killed; it ends by itself.

        Raises:
            StoppedError: The ablation was asked to stop.
        """
        told = False
        for folder in folders:
            while folder.is_dir():
                self.check()
                try:
                    lock = lock_folder(folder)
                except FolderInUseError as error:
                    if not told:
                        print(f"{name}: waiting for another process: {error}", flush=True)
                    told = True
                    time.sleep(_WAIT)
                    continue
                if lock is not None:
                    lock.close()
                break


def _reason(log: Path, start: int, code: int) -> str:
    """Return the last error of a process, or its last line and how it ended."""
    with log.open("rb") as file:
        file.seek(start)
        text = file.read().decode("utf-8", errors="replace")
    errors: Sequence[str] = _ERROR.findall(text)
    if errors:
        return errors[-1]
    ending = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
    lines = [line.strip() for line in text.splitlines()[1:] if line.strip()]
    return f"{ending}, last line: {lines[-1]}" if lines else ending
