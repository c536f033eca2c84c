"""The details of an evaluation: metrics of each class, and pictures.

A trainer's report collects them during an evaluation. The engine then writes
`metrics_per_class.json` and `metrics_per_class.png` to the output folder.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from engine.checkpoint import replacing
from engine.optional import is_installed

__all__ = ["Report", "write_pictures", "write_report"]

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


def write_report(report: Report, folder: Path, **entries: Any) -> None:
    """Write the metrics of each class to a folder, over those of an earlier evaluation.

    Args:
        report: Details of the evaluation.
        folder: Existing folder.
        **entries: Further entries of the JSON file, such as the epoch.
    """
    with replacing(folder / f"{_NAME}.json") as temporary:
        text = json.dumps({**entries, **report.per_class}, ensure_ascii=False, indent=1)
        temporary.write_text(text + "\n", encoding="utf-8")
    if not is_installed("matplotlib"):
        logger.info("%s.png needs the package matplotlib: pip install matplotlib", _NAME)
        return
    with replacing(folder / f"{_NAME}.png") as temporary:
        report.draw(temporary)


def write_pictures(report: Report, folder: Path) -> None:
    """Write the pictures to `images/<name>_<number>.png` in a folder."""
    for name, arrays in report.pictures.items():
        (folder / "images").mkdir(exist_ok=True)
        for number, array in enumerate(arrays):
            Image.fromarray(array).save(folder / "images" / f"{name}_{number}.png")
