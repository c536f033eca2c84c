"""The detections of many images as a few flat arrays.

Processes send each other these arrays instead of a Python object per detection.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as coco_masks
from torch import Tensor

__all__ = ["CocoDetections", "EncodedMasks"]


@dataclass(frozen=True)
class EncodedMasks:
    """D masks as run lengths in the compressed format of pycocotools.

    Attributes:
        sizes: Height and width, (D, 2) int64.
        areas: Number of pixels, (D,) int64.
        starts: Position of the first byte of each mask, (D,) int64.
        lengths: Number of bytes of each mask, (D,) int64.
        blob: The bytes of the masks, uint8.
    """

    sizes: np.ndarray
    areas: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    blob: np.ndarray

    @classmethod
    def encode(cls, masks: np.ndarray) -> "EncodedMasks":
        """Encode masks `(D, H, W)` bool."""
        columns_first = masks.astype(np.uint8).transpose(1, 2, 0)
        return cls.of_rle(coco_masks.encode(np.asfortranarray(columns_first)))

    @classmethod
    def of_rle(cls, masks: Sequence[Mapping[str, Any]]) -> "EncodedMasks":
        """Pack masks as pycocotools returns them."""
        counts = [mask["counts"] for mask in masks]
        lengths = np.array([len(count) for count in counts], dtype=np.int64)
        # pycocotools fails for a list of more than 255 masks.
        areas = [int(coco_masks.area(mask)) for mask in masks]
        return cls(
            sizes=np.array([mask["size"] for mask in masks], dtype=np.int64).reshape(-1, 2),
            areas=np.array(areas, dtype=np.int64),
            starts=np.cumsum(lengths) - lengths,
            lengths=lengths,
            blob=np.frombuffer(b"".join(counts), dtype=np.uint8),
        )

    @classmethod
    def join(cls, parts: Sequence["EncodedMasks"]) -> "EncodedMasks":
        """Return the masks of all parts."""
        sizes = [part.blob.size for part in parts]
        offsets = np.cumsum([0, *sizes[:-1]])
        return cls(
            sizes=np.concatenate([part.sizes for part in parts]),
            areas=np.concatenate([part.areas for part in parts]),
            starts=np.concatenate([p.starts + at for p, at in zip(parts, offsets, strict=True)]),
            lengths=np.concatenate([part.lengths for part in parts]),
            blob=np.concatenate([part.blob for part in parts]),
        )

    def take(self, rows: np.ndarray) -> "EncodedMasks":
        """Return the masks of some rows."""
        columns = (self.sizes, self.areas, self.starts, self.lengths)
        return EncodedMasks(*(column[rows] for column in columns), self.blob)

    def to_rle(self) -> list[dict[str, Any]]:
        """Return the masks as pycocotools expects them."""
        content = self.blob.tobytes()
        ends = (self.starts + self.lengths).tolist()
        return [
            {"size": size, "counts": content[start:end]}
            for size, start, end in zip(
                self.sizes.tolist(), self.starts.tolist(), ends, strict=True
            )
        ]


@dataclass(frozen=True)
class CocoDetections:
    """The D detections of I images, grouped by image.

    Attributes:
        image_ids: Ids of the images, also of those without detections, (I,) int64.
        counts: Number of detections of each image, (I,) int64.
        categories: Category ids, (D,) int64.
        scores: Scores, (D,) float64.
        boxes: Boxes x, y, width, height in pixels of the original image, (D, 4) float64.
        masks: The masks; None for boxes alone.
    """

    image_ids: np.ndarray
    counts: np.ndarray
    categories: np.ndarray
    scores: np.ndarray
    boxes: np.ndarray
    masks: EncodedMasks | None

    @classmethod
    def of_image(
        cls,
        image_id: int,
        prediction: Mapping[str, Tensor],
        label_to_category: Mapping[int, int] | None,
        with_masks: bool,
    ) -> "CocoDetections":
        """Move the detections of one image to the CPU, without those that are not finite.

        Args:
            image_id: Id of the image.
            prediction: See `CocoEvaluator.update`.
            label_to_category: Category id of each label; detections with other labels are dropped.
                None if the labels are category ids.
            with_masks: Encode the masks.
        """
        labels = prediction["labels"].cpu().numpy()
        scores = prediction["scores"].double().cpu().numpy()
        boxes = prediction["boxes"].double().cpu().numpy()
        # COCOeval would count a box of nan as a match of every object.
        kept = np.isfinite(scores) & np.isfinite(boxes).all(1)
        if label_to_category is not None:
            kept &= np.isin(labels, list(label_to_category))
            categories = [label_to_category[label] for label in labels[kept].tolist()]
        else:
            categories = labels[kept].tolist()
        corners = boxes[kept]
        masks = EncodedMasks.encode(prediction["masks"].cpu().numpy()[kept]) if with_masks else None
        return cls(
            image_ids=np.array([image_id], dtype=np.int64),
            counts=np.array([len(categories)], dtype=np.int64),
            categories=np.array(categories, dtype=np.int64),
            scores=scores[kept],
            boxes=np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1),
            masks=masks,
        )

    @classmethod
    def join(cls, parts: Sequence["CocoDetections"]) -> "CocoDetections":
        """Return the detections of all parts in the order of the image ids.

        An image in several parts has the detections of the first. There must be at least one part.
        """
        image_ids = np.concatenate([part.image_ids for part in parts])
        counts = np.concatenate([part.counts for part in parts])
        starts = np.cumsum(counts) - counts
        image_ids, first = np.unique(image_ids, return_index=True)
        counts = counts[first]
        places = np.cumsum(counts) - counts
        rows = np.repeat(starts[first] - places, counts) + np.arange(counts.sum())
        masks = None
        if parts[0].masks is not None:
            masks = EncodedMasks.join([part.masks for part in parts if part.masks]).take(rows)
        return cls(
            image_ids=image_ids,
            counts=counts,
            categories=np.concatenate([part.categories for part in parts])[rows],
            scores=np.concatenate([part.scores for part in parts])[rows],
            boxes=np.concatenate([part.boxes for part in parts])[rows],
            masks=masks,
        )

    def image_of_detection(self) -> np.ndarray:
        """Return the image id of each detection, (D,) int64."""
        return np.repeat(self.image_ids, self.counts)
