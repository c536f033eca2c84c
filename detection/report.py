"""Details of an evaluation: AP and AR of each class, and drawn predictions next to the truth."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detection.boxes import cxcywh_to_xyxy
from detection.drawing import draw_objects
from engine import Report, is_main
from engine.pictures import MAX_BARS, captioned, draw_bars, resized, to_pixels

__all__ = ["MIN_SCORE", "DetectionReport"]

MIN_SCORE = 0.5
"""Score from which on a detection is drawn."""

_GAP = 8


class DetectionReport:
    """Collection of the details of the last evaluation.

    The metrics are those of the whole validation set. The pictures are the first images of the main
    process, the same ones in each evaluation.

    Args:
        classes: Class name of each label.
        pictures: Number of images to draw.
    """

    def __init__(self, classes: Sequence[str], pictures: int = 0) -> None:
        self._classes, self._number = list(classes), pictures
        self.reset()

    def reset(self) -> None:
        """Remove what an earlier evaluation has collected."""
        self._rows: dict[str, Mapping[str, list[dict[str, Any]]]] = {}
        self._pictures: list[np.ndarray] = []

    def add_images(
        self,
        images: Tensor,
        targets: Sequence[Mapping[str, Tensor]],
        detections: Sequence[Mapping[str, Tensor]],
    ) -> None:
        """Draw images with their truth and predictions, until there are enough pictures.

        Args:
            images: Images `(B, 3, H, W)`, uint8 or normalized, with padding at the right and the
                bottom.
            targets: Targets of the data set.
            detections: Detections of the post-processing, in pixels of the original images.
        """
        if not is_main():
            return
        for image, target, found in zip(images, targets, detections, strict=True):
            if len(self._pictures) == self._number:
                return
            self._pictures.append(self._picture(image, target, found))

    def add_metrics(self, prefix: str, rows: Mapping[str, list[dict[str, Any]]]) -> None:
        """Add the metrics of each class of a model, by IoU type."""
        self._rows["ema" if prefix else "model"] = rows

    def result(self) -> Report:
        """Return the details."""
        rows = self._rows["model"]
        pictures = {"predictions": self._pictures} if self._number else {}
        return Report(self._rows, lambda path: _draw_metrics(rows, path), pictures)

    def _name(self, label: int) -> str:
        """Return the name of a class, or its label if the model has more classes than the data."""
        return self._classes[label] if label < len(self._classes) else str(label)

    def _picture(
        self, image: Tensor, target: Mapping[str, Tensor], found: Mapping[str, Tensor]
    ) -> np.ndarray:
        """Draw the truth at the left and the predictions at the right."""
        height, width = target["size"].tolist()
        pixels = resized(to_pixels(image[:, :height, :width]))
        height, width = pixels.shape[1:]
        size = torch.tensor([width, height, width, height])
        truth = draw_objects(
            pixels,
            cxcywh_to_xyxy(target["boxes"].cpu()) * size,
            [self._name(label) for label in target["labels"].tolist()],
            target["labels"].tolist(),
            target.get("masks"),
        )
        found = {name: values.cpu() for name, values in found.items()}
        order = found["scores"].argsort(descending=True, stable=True)
        kept = order[found["scores"][order] >= MIN_SCORE]
        labels, scores = found["labels"][kept].tolist(), found["scores"][kept].tolist()
        original = target["orig_size"].cpu().flip(0).repeat(2)
        predicted = draw_objects(
            pixels,
            found["boxes"][kept] * size / original,
            [f"{self._name(n)} {s:.2f}" for n, s in zip(labels, scores, strict=True)],
            labels,
            found["masks"][kept] if "masks" in found else None,
        )
        gap = torch.full((3, height, _GAP), 255, dtype=torch.uint8)
        line = f"image {int(target['image_id'])}: truth, predictions from a score of {MIN_SCORE}"
        return captioned(torch.cat([truth, gap, predicted], dim=2), [line])


def _draw_metrics(rows: Mapping[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw AP and AR of the classes with the lowest AP, with axes for each IoU type."""
    from matplotlib.figure import Figure

    weak = {
        kind: sorted((row for row in each if row["objects"]), key=lambda row: row["AP"])
        for kind, each in rows.items()
    }
    shown = min(MAX_BARS, max(map(len, weak.values())))
    figure = Figure(figsize=(7 * len(rows), 0.25 * shown + 1.5), layout="constrained")
    all_axes = figure.subplots(1, len(rows), squeeze=False)[0]
    for axes, (kind, each) in zip(all_axes, weak.items(), strict=True):
        part = each[:MAX_BARS]
        names = [f"{row['class']} ({row['objects']})" for row in part]
        draw_bars(axes, names, {name: [row[name] for row in part] for name in ("AP", "AR100")})
        which = (
            "" if len(part) == len(each) else f"the {len(part)} weakest of {len(each)} classes, "
        )
        of = "boxes" if kind == "bbox" else "masks"
        axes.set_title(f"AP and AR of {of} ({which}number of objects)")
        axes.set_xlim(0, 1)
    figure.savefig(path, format="png", dpi=100)
