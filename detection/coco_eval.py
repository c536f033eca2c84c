"""The twelve metrics of COCO, computed by pycocotools from the detections of all processes.

The detections are gathered once, at the end. Each image counts once, in the order of the image ids.
So the metrics depend neither on the number of processes nor on the order of the data.
"""

import contextlib
import io
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as coco_masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from engine.distributed import all_gather_object, broadcast_object, is_main

__all__ = ["METRICS", "CocoEvaluator", "format_metrics"]

METRICS = (
    "AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl",
)  # fmt: skip
"""Names in the order of pycocotools: average precision by IoU and object size, average recall by
number of detections and object size."""

_IOU_TYPES = ("bbox", "segm")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Detections:
    """The n detections of an image: scores `(n,)`, boxes `(n, 4)` (x, y, w, h), masks as RLE."""

    categories: list[int]
    scores: np.ndarray
    boxes: np.ndarray
    masks: list[dict[str, Any]] | None


class CocoEvaluator:
    """Collection of the detections of this process, and evaluation of those of all processes.

    Args:
        coco_gt: The annotations, which are not changed. Without `iscrowd` an object is not a crowd;
            without `area` it has the area of its box.
        iou_types: One or both of `bbox` and `segm`.
        label_to_category: Category id of each label of the model; detections with other labels are
            dropped. None if the labels are category ids.
        partial: Do not warn about annotated images that were not added.

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
    ) -> None:
        if unknown := [name for name in iou_types if name not in _IOU_TYPES]:
            raise ValueError(f"iou_types must be among bbox and segm, got {unknown[0]!r}")
        self.iou_types = tuple(iou_types)
        self._truth = _complete_annotations(coco_gt)
        self._categories = label_to_category
        self._partial = partial
        self.per_class: dict[str, list[dict[str, Any]]] = {}
        self._detections: dict[int, _Detections] = {}

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
                self._detections[image_id] = self._compact(prediction)

    def metrics(self) -> dict[str, dict[str, float]]:
        """Evaluate the detections of all processes; all processes must call it.

        Returns:
            The twelve `METRICS` in [0, 1] for each of `iou_types`. A metric is -1 if no annotated
            object has its size.

        Raises:
            ValueError: No process has added an image.
        """
        merged: dict[int, _Detections] = {}
        for detections in all_gather_object(self._detections):
            merged = detections | merged
        if not merged:
            raise ValueError("there are no images to evaluate")
        results = None
        if is_main():
            if len(merged) < len(self._truth.imgs) and not self._partial:
                logger.warning(
                    "evaluated %d of the %d annotated images", len(merged), len(self._truth.imgs)
                )
            results = {name: self._evaluate(name, merged) for name in self.iou_types}
        results = broadcast_object(results)
        self.per_class = {name: rows for name, (_, rows) in results.items()}
        return {name: metrics for name, (metrics, _) in results.items()}

    def _compact(self, prediction: Mapping[str, Tensor]) -> _Detections:
        """Move the detections of an image to the CPU, in the form that pycocotools needs."""
        labels = prediction["labels"].cpu().numpy()
        scores = prediction["scores"].double().cpu().numpy()
        boxes = prediction["boxes"].double().cpu().numpy()
        # COCOeval would count a box of nan as a match of every object.
        kept = np.isfinite(scores) & np.isfinite(boxes).all(1)
        if self._categories is not None:
            kept &= np.isin(labels, list(self._categories))
            categories = [self._categories[label] for label in labels[kept].tolist()]
        else:
            categories = labels[kept].tolist()
        corners = boxes[kept]
        return _Detections(
            categories=categories,
            scores=scores[kept],
            boxes=np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1),
            masks=_encode(prediction["masks"], kept) if "segm" in self.iou_types else None,
        )

    def _evaluate(
        self, iou_type: str, merged: dict[int, _Detections]
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Run pycocotools on the detections of all images; return metrics, also by category."""
        image_ids = sorted(merged)
        found = [
            entry
            for image_id in image_ids
            for entry in _entries(image_id, merged[image_id], iou_type)
        ]
        for number, entry in enumerate(found, start=1):
            entry["id"] = number
        detections = _coco(self._truth.dataset | {"annotations": found})
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = COCOeval(self._truth, detections, iou_type)
            evaluation.params.imgIds = image_ids
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        metrics = dict(zip(METRICS, evaluation.stats.tolist(), strict=True))
        return metrics, self._by_category(evaluation)

    def _by_category(self, evaluation: COCOeval) -> list[dict[str, Any]]:
        """Return the metrics of each category, for objects of all sizes and 100 detections."""
        images = set(evaluation.params.imgIds)
        objects = Counter(
            annotation["category_id"]
            for annotation in self._truth.dataset["annotations"]
            if annotation["image_id"] in images and not annotation["iscrowd"]
        )
        # The axes are IoU thresholds, recalls (only of the precision), categories, sizes, limits.
        precision = evaluation.eval["precision"][..., 0, -1]
        recall = evaluation.eval["recall"][..., 0, -1]
        return [
            {
                "class": self._truth.cats[category]["name"],
                "category_id": category,
                "objects": objects[category],
                "AP": _mean(precision[:, :, k]),
                "AP50": _mean(precision[0, :, k]),
                "AR100": _mean(recall[:, k]),
            }
            for k, category in enumerate(map(int, evaluation.params.catIds))
        ]


def _mean(values: np.ndarray) -> float:
    """Return the mean of the values that exist, which are not -1; -1 if none exists."""
    exist = values[values > -1]
    return float(exist.mean()) if exist.size else -1.0


def format_metrics(metrics: Mapping[str, float]) -> str:
    """Format the twelve metrics in two lines, precision and recall."""
    parts = [f"{name} {metrics[name]:.4f}" for name in METRICS]
    return "\n".join(["  ".join(parts[:6]), "  ".join(parts[6:])])


def _entries(image_id: int, found: _Detections, iou_type: str) -> Iterator[dict[str, Any]]:
    """Yield the detections of an image as annotations of pycocotools, without `id`."""
    rows = zip(found.categories, found.scores.tolist(), found.boxes.tolist(), strict=True)
    for i, (category, score, box) in enumerate(rows):
        entry = {
            "image_id": image_id,
            "category_id": category,
            "score": score,
            "bbox": box,
            "area": box[2] * box[3],
            "iscrowd": 0,
        }
        if iou_type == "segm":
            mask = found.masks[i]
            entry |= {"segmentation": mask, "area": float(coco_masks.area(mask))}
        yield entry


def _encode(masks: Tensor, kept: np.ndarray) -> list[dict[str, Any]]:
    """Encode the kept masks of `(n, H, W)` as run lengths."""
    columns_first = masks.cpu().numpy()[kept].astype(np.uint8).transpose(1, 2, 0)
    return coco_masks.encode(np.asfortranarray(columns_first))


def _complete_annotations(coco_gt: COCO) -> COCO:
    """Return a copy of the annotations, with defaults for missing fields.

    COCOeval writes into the annotations. It counts an object with the id 0 as not found, so the
    copies are numbered from 1.
    """
    annotations = []
    for number, annotation in enumerate(coco_gt.dataset["annotations"], start=1):
        area = annotation["bbox"][2] * annotation["bbox"][3]
        defaults = {"iscrowd": 0, "area": area}
        annotations.append(defaults | annotation | {"id": number})
    return _coco(coco_gt.dataset | {"annotations": annotations})


def _coco(dataset: dict[str, Any]) -> COCO:
    """Build pycocotools' index of a data set, without its output on stdout."""
    coco = COCO()
    coco.dataset = dataset
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco
