"""The twelve metrics of COCO, computed from the detections of all processes.

The detections are gathered once, at the end. Each image counts once, in the order of the image ids.
So the metrics depend neither on the number of processes nor on the order of the data. The library
that computes them is chosen in `coco_scoring`.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from torch import Tensor

from detection.coco_detections import CocoDetections
from detection.coco_scoring import Scorer, Scores, create_scorer
from engine.distributed import all_gather_object, broadcast_object, is_main

__all__ = ["METRICS", "CocoEvaluator", "format_metrics"]

METRICS = (
    "AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl",
)  # fmt: skip
"""Names in the order of pycocotools: average precision by IoU and object size, average recall by
number of detections and object size."""

_IOU_TYPES = ("bbox", "segm")
# Prefixes of the names of metrics.
_TITLES = {"": "boxes", "segm_": "masks", "ema_": "boxes, EMA", "ema_segm_": "masks, EMA"}

logger = logging.getLogger(__name__)


class CocoEvaluator:
    """Collection of the detections of this process, and evaluation of those of all processes.

    Args:
        coco_gt: The annotations, which are not changed and must not change. Without `iscrowd` an
            object is not a crowd; without `area` it has the area of its box.
        iou_types: One or both of `bbox` and `segm`.
        label_to_category: Category id of each label of the model; detections with other labels are
            dropped. None if the labels are category ids.
        partial: Do not warn about annotated images that were not added.
        library: See `create_scorer`.

    Attributes:
        per_class: Metrics of each category by IoU type, set by `metrics` in all processes. Each row
            has `class`, `category_id`, `objects` (without crowds) and in [0, 1] `AP`, `AP50` and
            `AR100`, which are -1 for a category without objects.

    Raises:
        ValueError: An IoU type is unknown.
    """

    def __init__(
        self,
        coco_gt: COCO,
        iou_types: Sequence[str] = ("bbox",),
        label_to_category: Mapping[int, int] | None = None,
        *,
        partial: bool = False,
        library: str = "auto",
    ) -> None:
        if unknown := [name for name in iou_types if name not in _IOU_TYPES]:
            raise ValueError(f"iou_types must be among bbox and segm, got {unknown[0]!r}")
        self.iou_types = tuple(iou_types)
        self._truth = coco_gt
        self._categories = label_to_category
        self._partial = partial
        self.per_class: dict[str, list[dict[str, Any]]] = {}
        self._library = library
        self._detections: dict[int, CocoDetections] = {}

    def reset(self) -> None:
        """Remove all detections."""
        self._detections.clear()

    def update(self, predictions: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Add the detections of some images; an image that was added before is ignored.

        Args:
            predictions: Image id → `scores` `(n,)`, `labels` `(n,)`, `boxes` `(n, 4)` as
                (x1, y1, x2, y2) in pixels of the original image, and for `segm` also `masks`
                `(n, H, W)`. Images without detections must be added too.

        Raises:
            ValueError: An image is not in the annotations, or masks are missing.
        """
        for image_id, prediction in predictions.items():
            if image_id not in self._truth.imgs:
                raise ValueError(f"image_id must be in the annotations, got {image_id}")
            if "segm" in self.iou_types and "masks" not in prediction:
                raise ValueError(
                    f"predictions must have masks for iou_types segm, got {', '.join(prediction)}"
                )
            if image_id not in self._detections:
                self._detections[image_id] = CocoDetections.of_image(
                    image_id, prediction, self._categories, "segm" in self.iou_types
                )

    def metrics(self) -> dict[str, dict[str, float]]:
        """Evaluate the detections of all processes; all processes must call it.

        Returns:
            The twelve `METRICS` in [0, 1] for each of `iou_types`. A metric is -1 if no annotated
            object has its size.

        Raises:
            ValueError: No process has added an image.
        """
        own = CocoDetections.join([*self._detections.values()]) if self._detections else None
        parts = [part for part in all_gather_object(own) if part is not None]
        if not parts:
            raise ValueError("there are no images to evaluate")
        results = None
        if is_main():
            detections = CocoDetections.join(parts)
            count, annotated = len(detections.image_ids), len(self._truth.imgs)
            if count < annotated and not self._partial:
                logger.warning("evaluated %d of the %d annotated images", count, annotated)
            results = {name: self._evaluate(name, detections) for name in self.iou_types}
        results = broadcast_object(results)
        self.per_class = {name: rows for name, (_, rows) in results.items()}
        return {name: metrics for name, (metrics, _) in results.items()}

    @cached_property
    def _scorer(self) -> Scorer:
        """The indexed annotations; only the main process builds them."""
        return create_scorer(self._truth, self.iou_types, self._library)

    def _evaluate(
        self, iou_type: str, detections: CocoDetections
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Evaluate the detections of all processes; return metrics, also by category."""
        scores = self._scorer.score(detections, iou_type)
        metrics = dict(zip(METRICS, scores.metrics, strict=True))
        return metrics, self._by_category(scores, detections.image_ids)

    def _by_category(self, scores: Scores, image_ids: np.ndarray) -> list[dict[str, Any]]:
        """Return the metrics of each category, for objects of all sizes and 100 detections."""
        images = set(image_ids.tolist())
        objects = Counter(
            annotation["category_id"]
            for annotation in self._truth.dataset["annotations"]
            if annotation["image_id"] in images and not annotation.get("iscrowd", 0)
        )
        return [
            {
                "class": self._truth.cats[category]["name"],
                "category_id": category,
                "objects": objects[category],
                "AP": _mean(scores.precision[:, :, k]),
                "AP50": _mean(scores.precision[0, :, k]),
                "AR100": _mean(scores.recall[:, k]),
            }
            for k, category in enumerate(sorted(self._truth.cats))
        ]


def _mean(values: np.ndarray) -> float:
    """Return the mean of the values that exist, which are not -1; -1 if none exists."""
    exist = values[values > -1]
    return float(exist.mean()) if exist.size else -1.0


def format_metrics(metrics: Mapping[str, float]) -> str:
    """Format the twelve metrics in two lines, precision and recall, for each model and IoU type.

    If there are several, a line before each names it.
    """
    prefixes = [name[: -len("AP75")] for name in metrics if name.endswith("AP75")]
    blocks = []
    for prefix in prefixes:
        parts = [f"{name} {metrics[prefix + name]:.4f}" for name in METRICS]
        title = [_TITLES.get(prefix, prefix)] if len(prefixes) > 1 else []
        blocks.append("\n".join([*title, "  ".join(parts[:6]), "  ".join(parts[6:])]))
    return "\n".join(blocks)
