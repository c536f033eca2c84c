"""Details of an evaluation: accuracy of each class, confusions, the most confident mistakes.

The details are those of the whole validation set, for any number of processes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine import Report, all_gather_object, rank, world_size
from engine.pictures import MAX_BARS, captioned, draw_bars, resized, to_pixels

__all__ = ["ClassReport"]

# A larger confusion matrix is drawn with several classes in a cell.
_MAX_CELLS = 400
_MAX_NAMES = 40
_MAX_COUNTS = 20


class _Mistake(NamedTuple):
    """A wrong answer; `order` is (-confidence, batch, place in the batch)."""

    order: tuple[float, int, int]
    target: int
    predicted: int
    pixels: Tensor


class ClassReport:
    """Collection of the details of the last evaluation.

    Args:
        classes: Class names.
        pictures: Number of mistakes to draw.
    """

    def __init__(self, classes: Sequence[str], pictures: int = 0) -> None:
        self._classes, self._number = list(classes), pictures
        self.reset()

    def reset(self) -> None:
        """Remove what an earlier evaluation has collected."""
        self._answers: dict[str, list[Tensor]] = {}
        self._mistakes: list[_Mistake] = []

    def add(self, prefix: str, batch: int, images: Tensor, logits: Tensor, answers: Tensor) -> None:
        """Add the answers of a model to a batch.

        Args:
            prefix: Prefix of the model's metrics; the mistakes of the model `""` are drawn.
            batch: Number of the batch in this process.
            images: Images `(B, 3, H, W)`, uint8 or normalized.
            logits: Logits `(B, C)`.
            answers: Classes and predicted classes `(2, B)`.
        """
        self._answers.setdefault(prefix, []).append(answers)
        if prefix or not self._number:
            return
        confidence = logits.softmax(-1).amax(-1).masked_fill(answers[0] == answers[1], 0.0)
        worst = confidence.topk(min(self._number, len(images)))
        # The number of the batch in the data set, so that processes do not change the order.
        batch = batch * world_size() + rank()
        for value, place in zip(worst.values.tolist(), worst.indices.tolist(), strict=True):
            is_full = len(self._mistakes) == self._number
            if value > 0 and not (is_full and -value > self._mistakes[-1].order[0]):
                target, predicted = answers[:, place].tolist()
                order = (-value, batch, place)
                self._mistakes.append(_Mistake(order, target, predicted, to_pixels(images[place])))
                self._sort_mistakes()

    def _sort_mistakes(self) -> None:
        """Keep the most confident mistakes; equal ones are in the order of the data."""
        self._mistakes.sort(key=lambda mistake: mistake.order)
        del self._mistakes[self._number :]

    def gather(self, *, shared: bool) -> None:
        """Merge the collections of all processes; all of them must call it.

        Args:
            shared: Whether the data is divided among the processes; else each has all of it.
        """
        own = {prefix: torch.cat(parts, 1).cpu() for prefix, parts in self._answers.items()}
        collected = (own, self._mistakes)
        everything = all_gather_object(collected) if shared else [collected]
        self._answers, self._mistakes = {}, []
        for answers, mistakes in everything:
            self._mistakes += mistakes
            for prefix, each in answers.items():
                self._answers.setdefault(prefix, []).append(each)
        self._sort_mistakes()

    def result(self) -> Report:
        """Return the details; call `gather` first."""
        pairs = {name: self._confusions(torch.cat(a, 1)) for name, a in self._answers.items()}
        rows = {"ema" if name else "model": self._rows(*each) for name, each in pairs.items()}

        def draw(path: Path) -> None:
            _draw(rows["model"], *pairs[""], path)

        return Report(rows, draw, {"mistakes": self._pictures()} if self._number else {})

    def _pictures(self) -> list[np.ndarray]:
        """Return the mistakes with captions."""
        pictures = []
        for order, target, predicted, pixels in self._mistakes:
            lines = [
                f"predicted {self._classes[predicted]} ({-order[0]:.2f})",
                f"truth {self._classes[target]}",
            ]
            pictures.append(captioned(resized(pixels), lines))
        return pictures

    def _confusions(self, answers: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return pairs of target and prediction that occur, and how often, each `(n,)`."""
        number = len(self._classes)
        target, predicted = answers.numpy()
        codes, counts = np.unique(target * number + predicted, return_counts=True)
        return codes // number, codes % number, counts

    def _rows(
        self, targets: np.ndarray, predicted: np.ndarray, counts: np.ndarray
    ) -> list[dict[str, Any]]:
        """Return the metrics of each class; the accuracy of a class without images is None."""
        rows: list[dict[str, Any]] = [
            {"class": name, "images": 0, "acc1": None, "confused_with": {}}
            for name in self._classes
        ]
        right = np.zeros(len(rows), dtype=np.int64)
        # The most frequent confusions come first.
        order = np.argsort(-counts, kind="stable")
        columns = (column[order].tolist() for column in (targets, predicted, counts))
        for t, p, n in zip(*columns, strict=True):
            rows[t]["images"] += n
            if t == p:
                right[t] = n
            else:
                rows[t]["confused_with"][self._classes[p]] = n
        for row, hits in zip(rows, right.tolist(), strict=True):
            if row["images"]:
                row["acc1"] = 100 * hits / row["images"]
        return rows


def _draw(
    rows: list[dict[str, Any]],
    targets: np.ndarray,
    predicted: np.ndarray,
    counts: np.ndarray,
    path: Path,
) -> None:
    """Draw the classes with the lowest accuracy and the confusion matrix."""
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    weak = sorted((row for row in rows if row["images"]), key=lambda row: row["acc1"])[:MAX_BARS]
    figure = Figure(figsize=(13, max(5.5, 0.2 * len(weak) + 1)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 3))
    names = [f"{row['class']} ({row['images']})" for row in weak]
    draw_bars(left, names, {"acc1": [row["acc1"] for row in weak]})
    left.set_xlim(0, 100)
    left.set_xlabel("top-1 accuracy in %")
    which = "" if len(weak) == len(rows) else f"the {len(weak)} weakest of {len(rows)} classes, "
    left.set_title(f"Accuracy ({which}number of images)")

    number = len(rows)
    cells = min(number, _MAX_CELLS)
    matrix = np.zeros((cells, cells))
    np.add.at(matrix, (targets * cells // number, predicted * cells // number), counts)
    percent = 100 * matrix / matrix.sum(1, keepdims=True).clip(1)
    # The square root makes rare confusions visible.
    edges = (-0.5, number - 0.5, number - 0.5, -0.5)
    picture = right.imshow(
        percent, norm=PowerNorm(0.5, 0, 100), cmap="Blues", interpolation="nearest", extent=edges
    )
    figure.colorbar(picture, ax=right, label="% of the images of the class", shrink=0.8)
    right.set(title="Confusion matrix", xlabel="predicted", ylabel="truth")
    if number <= _MAX_NAMES:
        names = [row["class"][:16] for row in rows]
        right.set_xticks(range(number), names, rotation=90, parse_math=False)
        right.set_yticks(range(number), names, parse_math=False)
    if number <= _MAX_COUNTS:
        for row, column in np.argwhere(matrix).tolist():
            color = "white" if percent[row, column] > 40 else "black"
            text = f"{matrix[row, column]:.0f}"
            right.text(column, row, text, color=color, ha="center", va="center", fontsize=8)
    figure.savefig(path, format="png", dpi=100)
