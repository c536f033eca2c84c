"""Logs of a run: log lines, one JSON line per epoch, and curves and pictures in loggers.

`setup_logging` sets the handlers once, at the start of a command. Modules log through
`logging.getLogger(__name__)` and never print. Only the main process writes files.
"""

import json
import logging
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from engine.distributed import is_main
from engine.loggers import RunLogger, open_loggers

__all__ = ["RunLog", "setup_logging"]

logger = logging.getLogger(__name__)


def setup_logging(output_dir: Path | None = None, rank: int = 0) -> None:
    """Send log records to stdout and, in the main process, to `output_dir/run.log`.

    The main process shows INFO and above. The others show only warnings, with their rank. A second
    call replaces the handlers of the first one and keeps those of other code. With `output_dir`,
    the run continues if stdout cannot be written any more, as after `| head`.

    Args:
        output_dir: Existing folder for `run.log`; None for none.
        rank: Number of this process.
    """
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if hasattr(handler, "set_by_engine")]:
        root.removeHandler(handler)
        handler.close()
    place = f"[rank {rank}] " if rank else ""
    form = logging.Formatter(f"%(asctime)s {place}%(message)s", datefmt="%Y-%m-%d %H:%M:%S")
    handlers: list[logging.Handler] = [_ConsoleHandler(may_close=output_dir is not None)]
    if output_dir is not None and rank == 0:
        handlers.append(logging.FileHandler(output_dir / "run.log", encoding="utf-8"))
    for handler in handlers:
        handler.set_by_engine = True
        handler.setFormatter(form)
        handler.setLevel(logging.INFO if rank == 0 else logging.WARNING)
        root.addHandler(handler)
    root.setLevel(logging.INFO)


class _ConsoleHandler(logging.Handler):
    """A handler that writes to stdout, above a progress bar.

    Args:
        may_close: Continue without stdout if it cannot be written any more; false raises OSError.
    """

    def __init__(self, *, may_close: bool) -> None:
        super().__init__()
        self._may_close = may_close

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        try:
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()
        except OSError as error:
            if not self._may_close:
                raise
            # The text in the buffer cannot be written either, now or at the exit of the process.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            logger.warning("the console is closed (%s): the run continues", error.strerror)


class RunLog:
    """Metrics of a run: one JSON line per epoch in `log.txt`, curves and pictures in loggers.

    A resumed run continues both. The log has one line per epoch: if an epoch runs again after a
    resumption, its new line replaces the old one. A new run renames the `log.txt` of an earlier run
    in the same folder to `log.1.txt`. A logger that fails is closed with a warning, and the run
    continues without it.

    Args:
        output_dir: Existing folder; None writes nothing. Only the main process writes.
        start_step: Number of optimizer steps done in all epochs, 0 for a new run. The curves of a
            resumed run are cut there.
        loggers: Names of the loggers, see `engine.loggers`.
        config: Options of the run, as plain values, for the loggers.

    Raises:
        UserError: A logger cannot be opened.
    """

    def __init__(
        self,
        output_dir: Path | None,
        *,
        start_step: int = 0,
        loggers: Iterable[str] = ("tensorboard",),
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self._path = output_dir / "log.txt" if output_dir is not None and is_main() else None
        self._loggers: dict[str, RunLogger] = {}
        if self._path is None:
            return
        if start_step == 0:
            _rename_old_log(self._path)
        self._loggers = open_loggers(list(loggers), self._path.parent, config or {}, start_step)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add points to the curves of the loggers.

        Args:
            values: Values by the name of their curve, such as `train/loss`.
            step: Number of optimizer steps done in all epochs.
        """
        self._send("scalars", values, step)

    def images(self, pictures: Mapping[str, Sequence[np.ndarray]], step: int) -> None:
        """Add pictures to the loggers.

        Args:
            pictures: Pictures `(H, W, 3)` uint8, in lists by name.
            step: Number of optimizer steps done in all epochs.
        """
        self._send("images", pictures, step)

    def write_epoch(self, record: Mapping[str, Any], step: int) -> None:
        """Write the line of an epoch, and its `test_*` metrics as curves `test/*`.

        Args:
            record: `epoch`, `n_parameters`, `train_*` and `test_*`, as plain values.
            step: Number of optimizer steps done in all epochs.
        """
        if self._path is None:
            return
        old = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
        lines = [line for line in old if _epoch_of(line) != record["epoch"]]
        text = "".join(f"{line}\n" for line in [*lines, json.dumps(record)])
        temporary = self._path.with_name(".log.txt.tmp")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(self._path)
        test = {name: value for name, value in record.items() if name.startswith("test_")}
        if test:
            self.scalars({f"test/{name[5:]}": value for name, value in test.items()}, step)

    def close(self, failed: bool = False) -> None:
        """Send what is still in memory, and close the loggers.

        Args:
            failed: True if the run ends by an error or a signal.
        """
        self._send("close", failed)
        self._loggers = {}

    def _send(self, method: str, *values: Any) -> None:
        """Call a method of all loggers; remove those that fail."""
        for name, each in list(self._loggers.items()):
            try:
                getattr(each, method)(*values)
            except Exception as error:
                # A server that fails must not end a training of days.
                logger.warning("--logger %s failed, the run continues without it: %s", name, error)
                del self._loggers[name]

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        self.close(failed=kind is not None)


def _epoch_of(line: str) -> int | None:
    """Return the epoch of a line of `log.txt`, or None for a line in another form."""
    try:
        return json.loads(line)["epoch"]
    except (ValueError, KeyError, TypeError):
        return None


def _rename_old_log(path: Path) -> None:
    """Rename `log.txt` to the first free name among `log.1.txt`, `log.2.txt` and so on."""
    if not path.exists():
        return
    number = 1
    while (new := path.with_name(f"log.{number}.txt")).exists():
        number += 1
    path.rename(new)
