"""The libraries that compute COCO's metrics: hotcoco if it is installed, otherwise pycocotools.

pycocotools is the reference. hotcoco computes the same arrays of precision and recall in a small
part of the time. Both get the same masks, encoded by pycocotools.
"""

import contextlib
import io
import logging
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple, Protocol

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from datasets.coco_entries import area_of
from datasets.coco_json import size_of
from detection.coco_detections import CocoDetections
from engine.optional import is_installed

__all__ = ["Scorer", "Scores", "create_scorer"]

logger = logging.getLogger(__name__)


class Scores(NamedTuple):
    """Results of an evaluation; values that do not exist are -1.

    Attributes:
        metrics: The twelve metrics, in the order of pycocotools.
        precision: Precision for objects of all sizes and 100 detections, (IoU thresholds, recalls,
            categories).
        recall: The same for the recall, (IoU thresholds, categories).
    """

    metrics: list[float]
    precision: np.ndarray
    recall: np.ndarray


class Scorer(Protocol):
    """The annotations of a data set, indexed by a library."""

    def score(self, detections: CocoDetections, iou_type: str) -> Scores:
        """Evaluate the images of `detections`.

        Args:
            detections: Detections of all processes.
            iou_type: `bbox` or `segm`.
        """
        ...


def create_scorer(truth: COCO, iou_types: Collection[str], library: str = "auto") -> Scorer:
    """Index the annotations, and log which library evaluates them.

    Args:
        truth: The annotations, which are not changed.
        iou_types: One or both of `bbox` and `segm`.
        library: `hotcoco`, `pycocotools`, or `auto` (hotcoco if it is installed).

    Raises:
        ValueError: The library is unknown.
    """
    if library not in ("auto", "hotcoco", "pycocotools"):
        raise ValueError(f"library must be auto, hotcoco or pycocotools, got {library!r}")
    if library == "auto":
        library = "hotcoco" if is_installed("hotcoco") else "pycocotools"
    faster = "" if library == "hotcoco" else "; `pip install hotcoco` is faster, with equal metrics"
    logger.info("COCO metrics by %s %s%s", library, version(library), faster)
    with_masks = "segm" in iou_types
    annotations = _complete(truth, with_masks)
    if library == "hotcoco":
        return _Hotcoco(truth.dataset, annotations, with_masks)
    return _Pycocotools(truth.dataset, annotations)


def _complete(truth: COCO, with_masks: bool) -> list[dict[str, Any]]:
    """Return copies of the annotations that can be evaluated, with defaults for missing fields.

    COCOeval writes into the annotations. It counts an object with the id 0 as not found, so the
    copies are numbered from 1.
    """
    completed = []
    for number, annotation in enumerate(truth.dataset["annotations"], start=1):
        if annotation["image_id"] not in truth.imgs or annotation["category_id"] not in truth.cats:
            continue
        entry = {"iscrowd": 0} | annotation | {"id": number, "area": area_of(annotation)}
        if with_masks:
            # A crowd may have no segmentation: its region is its box.
            region = annotation.get("segmentation") or [_corners(annotation["bbox"])]
            entry["segmentation"] = truth.annToRLE(annotation | {"segmentation": region})
        completed.append(entry)
    return completed


def _corners(box: Sequence[float]) -> list[float]:
    """Return a box x, y, width, height as a polygon."""
    x, y, width, height = box
    return [x, y, x + width, y, x + width, y + height, x, y + height]


class _Pycocotools:
    """The reference."""

    def __init__(
        self, dataset: Mapping[str, Any], annotations: Sequence[Mapping[str, Any]]
    ) -> None:
        self._truth = _index(dict(dataset) | {"annotations": list(annotations)})

    def score(self, detections: CocoDetections, iou_type: str) -> Scores:
        """Evaluate the images of `detections`."""
        found = _index(self._truth.dataset | {"annotations": _entries(detections, iou_type)})
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = COCOeval(self._truth, found, iou_type)
            evaluation.params.imgIds = detections.image_ids.tolist()
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return _scores(evaluation)


class _Hotcoco:
    """The fast evaluator, from flat arrays."""

    def __init__(
        self,
        dataset: Mapping[str, Any],
        annotations: Sequence[Mapping[str, Any]],
        with_masks: bool,
    ) -> None:
        import hotcoco

        def column(key: str, dtype: type) -> np.ndarray:
            return np.array([entry[key] for entry in annotations], dtype=dtype)

        masks = [entry["segmentation"] for entry in annotations] if with_masks else None
        self._truth = hotcoco.COCO.from_arrays(
            [
                {"id": int(image["id"]), "width": size_of(image)[0], "height": size_of(image)[1]}
                for image in dataset["images"]
            ],
            [
                {"id": int(entry["id"]), "name": str(entry["name"])}
                for entry in dataset["categories"]
            ],
            column("image_id", np.int64),
            column("category_id", np.int64),
            column("bbox", np.float64).reshape(-1, 4),
            ids=column("id", np.int64),
            area=column("area", np.float64),
            iscrowd=column("iscrowd", np.int64),
            segmentation=masks,
        )

    def score(self, detections: CocoDetections, iou_type: str) -> Scores:
        """Evaluate the images of `detections`."""
        import hotcoco

        columns = (detections.image_of_detection(), detections.boxes, detections.scores)
        rows = np.column_stack([*columns, detections.categories])
        masks = detections.masks.to_rle() if iou_type == "segm" else None
        found = self._truth.load_res(rows, segmentation=masks)
        if masks:
            # The areas of the masks replace those of the boxes.
            ids = np.arange(1, len(masks) + 1)
            found.update_anns(ids=ids, area=detections.masks.areas.astype(np.float64))
        evaluation = hotcoco.COCOeval(self._truth, found, iou_type)
        evaluation.params.imgIds = detections.image_ids.tolist()
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation.run()
        return _scores(evaluation)


def _scores(evaluation: Any) -> Scores:
    """Return the results of a `COCOeval` of either library."""
    # The last axes are categories, sizes (the first for all) and limits (the last of 100).
    precision, recall = (evaluation.eval[name][..., 0, -1] for name in ("precision", "recall"))
    return Scores(np.asarray(evaluation.stats).tolist(), precision, recall)


def _entries(detections: CocoDetections, iou_type: str) -> list[dict[str, Any]]:
    """Return detections as annotations of pycocotools."""
    boxes = detections.boxes
    areas = boxes[:, 2] * boxes[:, 3]
    columns = {
        "image_id": detections.image_of_detection().tolist(),
        "category_id": detections.categories.tolist(),
        "score": detections.scores.tolist(),
        "bbox": boxes.tolist(),
    }
    if iou_type == "segm":
        columns["segmentation"] = detections.masks.to_rle()
        areas = detections.masks.areas.astype(np.float64)
    columns["area"] = areas.tolist()
    return [
        dict(zip(columns, row, strict=True), iscrowd=0, id=number)
        for number, row in enumerate(zip(*columns.values(), strict=True), start=1)
    ]


def _index(dataset: dict[str, Any]) -> COCO:
    """Build pycocotools' index of a data set, without its output on stdout."""
    coco = COCO()
    coco.dataset = dataset
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco
