"""Details of an evaluation: accuracy of each class, confusions, the most confident mistakes.

The details are those of the whole validation set, for any number of processes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

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


class ClassReport:
    """Collection of the details of the last evaluation.

    Args:
        classes: Class names.
        pictures: Number of mistakes to draw.
    """

    def __init__(self, classes: Sequence[str], pictures: int = 0) -> None:
        self._classes, self._pictures = list(classes), pictures
        self.reset()

    def reset(self) -> None:
        """Remove what an earlier evaluation has collected."""
        self._answers: dict[str, list[Tensor]] = {}
        # (-confidence, batch, place in it), which orders them, then target, prediction and image.
        self._mistakes: list[tuple[tuple[float, int, int], int, int, Tensor]] = []

    def add(
        self, prefix: str, batch: int, images: Tensor, logits: Tensor, predicted: Tensor,
        targets: Tensor,
    ) -> None:  # fmt: skip
        """Add the answers of a model to a batch.

        Args:
            prefix: Prefix of the model's metrics; the mistakes of the model `""` are drawn.
            batch: Number of the batch in this process.
            images: Normalized images `(B, 3, H, W)`.
            logits: Logits `(B, C)`.
            predicted: Most probable classes `(B,)`.
            targets: Classes `(B,)`.
        """
        self._answers.setdefault(prefix, []).append(torch.stack([targets, predicted]))
        if prefix or not self._pictures:
            return
        confidence = logits.softmax(-1).amax(-1)
        confidence = confidence.masked_fill(predicted == targets, 0.0)
        worst = confidence.topk(min(self._pictures, len(targets)))
        # The number of the batch in the data set, so that processes do not change the order.
        number = batch * world_size() + rank()
        for value, place in zip(worst.values.tolist(), worst.indices.tolist(), strict=True):
            key = (-value, number, place)
            full = len(self._mistakes) == self._pictures
            if not value > 0 or (full and key > self._mistakes[-1][0]):
                continue
            pixels = to_pixels(images[place])
            pair = int(targets[place]), int(predicted[place])
            self._mistakes = sorted([*self._mistakes, (key, *pair, pixels)], key=lambda m: m[0])
            del self._mistakes[self._pictures :]

    def gather(self, *, shared: bool) -> None:
        """Merge the collections of all processes; all of them must call it.

        Args:
            shared: Whether the data is divided among the processes; else each has all of it.
        """
        empty = torch.zeros(2, 0, dtype=torch.int64)
        answers = {name: torch.cat(pairs, 1).cpu() for name, pairs in self._answers.items()}
        own = (answers, self._mistakes)
        everything = all_gather_object(own) if shared else [own]
        names = {name: None for answers, _ in everything for name in answers}
        self._answers = {
            name: [torch.cat([answers.get(name, empty) for answers, _ in everything], 1)]
            for name in names
        }
        mistakes = [mistake for _, theirs in everything for mistake in theirs]
        self._mistakes = sorted(mistakes, key=lambda m: m[0])[: self._pictures]

    def result(self) -> Report:
        """Return the details; call `gather` first."""
        confusions = {name: self._confusions(pairs[0]) for name, pairs in self._answers.items()}
        rows = {
            "ema" if prefix else "model": self._rows(*each) for prefix, each in confusions.items()
        }
        pictures = [
            captioned(
                resized(pixels),
                [
                    f"predicted {self._classes[predicted]} ({-key[0]:.2f})",
                    f"truth {self._classes[target]}",
                ],
            )
            for key, target, predicted, pixels in self._mistakes
        ]

        def draw(path: Path) -> None:
            _draw(rows["model"], *confusions[""], path)

        return Report(rows, draw, {"mistakes": pictures} if self._pictures else {})

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
