"""The progress of an ablation: one line for each cell, with the time left."""

import sys
from pathlib import Path

from tqdm import tqdm

from engine.progress import duration
from scripts.ablate.cells import Ablation, Cell
from scripts.ablate.results import metric_at, read_result

__all__ = ["CellProgress"]


class CellProgress:
    """Context manager for the lines of finished cells and, on a terminal, a bar.

    Args:
        ablation: The ablation.
        total: Number of cells.
        waiting: Number of cells to run.
        output_dir: Folder of the ablation.
        jobs: Number of cells at once.
    """

    def __init__(
        self, ablation: Ablation, total: int, waiting: int, output_dir: Path, jobs: int
    ) -> None:
        self._ablation, self._output_dir, self._jobs = ablation, output_dir, jobs
        self._total, self._waiting, self._ended = total, waiting, 0
        self._seconds: list[float] = []
        is_terminal = sys.stdout.isatty()
        self._bar = tqdm(
            total=total, initial=total - waiting, file=sys.stdout, disable=not is_terminal
        )
        if waiting < total:
            tqdm.write(f"{total - waiting} of {total} cells are done")

    def done(self, cell: Cell, seconds: float) -> None:
        """Print the line of a finished cell."""
        self._seconds.append(seconds)
        result = read_result(cell, self._output_dir) or {}
        label = next(iter(cell.evaluations), "")
        metric = self._ablation.file.metric
        value = (metric_at(cell, result, label) or {}).get(metric) if result else None
        at = f" at {label}" if label else ""
        shown = "no result" if value is None else f"{metric} {value:.4g}{at}"
        self._end(f"{cell.name}: {shown}, {duration(seconds)}")

    def failed(self, line: str) -> None:
        """Print the line of a failed cell."""
        self._end(line)

    def _end(self, line: str) -> None:
        """Count one cell and print its line with the time left."""
        self._ended += 1
        left = self._waiting - self._ended
        count = f"[{self._total - left}/{self._total}] "
        seconds = sum(self._seconds) / max(len(self._seconds), 1) * left / self._jobs
        tail = f"  (left about {duration(seconds)})" if left and self._seconds else ""
        tqdm.write(count + line + tail)
        sys.stdout.flush()
        self._bar.update()

    def __enter__(self) -> "CellProgress":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()
