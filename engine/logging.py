"""Logs of a run: readable lines, JSON lines by epoch and TensorBoard curves.

Handlers are set once, by `setup_logging` in main; modules log through `logging.getLogger(__name__)`
and print nothing. Files are written by the main process alone.
"""

import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from engine.distributed import is_main


def setup_logging(output_dir: Path | None = None, rank: int = 0) -> None:
    """Sends log records to stdout and, from the main process, to `output_dir/run.log`.

    The main process shows INFO and above, the others only warnings, which name their rank. Calling
    it again replaces its own handlers and leaves those of others alone.
    """
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if hasattr(handler, "set_by_engine")]:
        root.removeHandler(handler)
        handler.close()
    place = f"[rank {rank}] " if rank else ""
    form = logging.Formatter(f"%(asctime)s {place}%(message)s", datefmt="%Y-%m-%d %H:%M:%S")
    handlers: list[logging.Handler] = [_ConsoleHandler()]
    if output_dir is not None and rank == 0:
        handlers.append(logging.FileHandler(output_dir / "run.log", encoding="utf-8"))
    for handler in handlers:
        handler.set_by_engine = True
        handler.setFormatter(form)
        handler.setLevel(logging.INFO if rank == 0 else logging.WARNING)
        root.addHandler(handler)
    root.setLevel(logging.INFO)


class _ConsoleHandler(logging.Handler):
    """Writes to stdout without tearing a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


class RunLog:
    """Figures of a run: a JSON line per epoch in `log.txt`, and TensorBoard curves.

    A resumed run continues both. An epoch has one line: if it is run again, since the run was
    resumed from before its end, the new line takes the place of the old one. A new run in a
    directory that holds an older one's `log.txt` renames it to `log.1.txt`.

    Args:
        output_dir: an existing directory; None, or any process but the main one, writes nothing.
        start_step: optimizer steps done so far over all epochs, 0 for a new run. Curves of a
            resumed run are cut there.
    """

    def __init__(self, output_dir: Path | None, *, start_step: int = 0) -> None:
        self._path = output_dir / "log.txt" if output_dir is not None and is_main() else None
        self._curves = None
        if self._path is None:
            return
        if start_step == 0:
            _set_aside(self._path)
        # Imported here: it takes seconds, and only the main process needs it.
        from torch.utils.tensorboard import SummaryWriter

        purge = start_step + 1 if start_step else 0
        self._curves = SummaryWriter(str(self._path.parent / "tensorboard"), purge_step=purge)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Adds points to the TensorBoard curves of the given names, such as `train/loss`."""
        if self._curves is not None:
            for name, value in values.items():
                self._curves.add_scalar(name, value, step)

    def write_epoch(self, record: Mapping[str, Any], step: int) -> None:
        """Writes an epoch's line, and its `test_*` figures as curves `test/*`.

        Args:
            record: plain values: `epoch`, `n_parameters`, `train_*`, `test_*`.
            step: optimizer steps done so far over all epochs.
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
        self.scalars({f"test/{name[5:]}": value for name, value in test.items()}, step)
        self._curves.flush()

    def close(self) -> None:
        """Writes what is still held back."""
        if self._curves is not None:
            self._curves.close()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _epoch_of(line: str) -> int | None:
    try:
        return json.loads(line)["epoch"]
    except (ValueError, KeyError, TypeError):  # not one of ours: it stays
        return None


def _set_aside(path: Path) -> None:
    if not path.exists():
        return
    number = 1
    while (aside := path.with_name(f"log.{number}.txt")).exists():
        number += 1
    path.rename(aside)
