"""The details of an evaluation: metrics of each class, and pictures.

A trainer's report collects them during an evaluation. The engine then writes
`metrics_per_class.json` and `metrics_per_class.png` to the output folder.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from engine.checkpoint import replacing
from engine.optional import is_installed

__all__ = ["Report", "ReportWriter", "write_pictures"]

logger = logging.getLogger(__name__)

_NAME = "metrics_per_class"


@dataclass(frozen=True)
class Report:
    """Details of one evaluation.

    Attributes:
        per_class: Metrics of each class, as plain values for JSON.
        draw: Function that draws them to a path with matplotlib.
        pictures: Pictures `(H, W, 3)` uint8, in lists by name.
    """

    per_class: Mapping[str, Any]
    draw: Callable[[Path], None]
    pictures: Mapping[str, Sequence[np.ndarray]] = field(default_factory=dict)


class ReportWriter:
    """Writer of the files of a report, over those of an earlier evaluation.

    JSON is written each time. Drawing takes a third of a second, more than an evaluation of a small
    data set, so the picture is drawn only if that costs less than a twentieth of the time since the
    last drawing, and at the end.

    Args:
        folder: Existing folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._drawn = self._cost = 0.0

    def write(self, report: Report, *, is_last: bool = True, **entries: Any) -> None:
        """Write `metrics_per_class.json` and, if it is due, `metrics_per_class.png`.

        Args:
            report: Details of the evaluation.
            is_last: True for the last evaluation, which is always drawn.
            **entries: Further entries of the JSON file, such as the epoch.

        Raises:
            UserError: A file cannot be written.
        """
        with replacing(self._folder / f"{_NAME}.json") as temporary:
            text = json.dumps({**entries, **report.per_class}, ensure_ascii=False, indent=1)
            temporary.write_text(text + "\n", encoding="utf-8")
        start = time.perf_counter()
        if not is_last and self._cost and start - self._drawn < 20 * self._cost:
            return
        if not is_installed("matplotlib"):
            if is_last:
                logger.info("%s.png needs the package matplotlib: pip install matplotlib", _NAME)
            return
        with replacing(self._folder / f"{_NAME}.png") as temporary:
            report.draw(temporary)
        self._drawn = time.perf_counter()
        self._cost = self._drawn - start


def write_pictures(report: Report, folder: Path) -> None:
    """Write the pictures to `images/<name>_<number>.png` in a folder."""
    for name, arrays in report.pictures.items():
        (folder / "images").mkdir(exist_ok=True)
        for number, array in enumerate(arrays):
            Image.fromarray(array).save(folder / "images" / f"{name}_{number}.png")
