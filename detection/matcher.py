"""The matcher: a one-to-one assignment of queries to objects with the lowest total cost.

    cost(i, j) = -cost_class·p_i(class_j) + cost_bbox·|b_i - b_j|_1 - cost_giou·GIoU(b_i, b_j)

This is the cost of query i for object j of the same image, with the probability itself instead of
its logarithm. The costs of all decoder layers are computed on the device and copied to the host
together, which is the only wait for the device. scipy finds the assignments.

Source: DETR (Carion et al., ECCV 2020), section 3.1, Eq. 1.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from detection.boxes import cxcywh_to_xyxy, generalized_iou
from engine.tensors import copy_from_host

__all__ = ["HungarianMatcher", "Matches", "Objects"]

# Replaces costs that are not finite: larger than any other cost, but finite when added up.
_LARGE_COST = 1e6


class Objects(NamedTuple):
    """The N objects of a batch, image after image."""

    counts: list[int]
    """Number of objects of every image."""
    images: Tensor
    """Number of the image of every object, `(N,)`."""
    labels: Tensor
    """Labels, `(N,)`."""
    boxes: Tensor
    """Boxes as normalized (cx, cy, w, h), `(N, 4)`."""

    @classmethod
    def of(cls, targets: Sequence[dict[str, Tensor]]) -> "Objects":
        """Join the `labels` `(n,)` and `boxes` `(n, 4)` of every image."""
        labels = torch.cat([target["labels"] for target in targets])
        boxes = torch.cat([target["boxes"] for target in targets])
        counts = [len(target["labels"]) for target in targets]
        images = torch.from_numpy(np.repeat(np.arange(len(counts)), counts))
        return cls(counts, copy_from_host(images, labels.device), labels, boxes)


class Matches(NamedTuple):
    """The P matched pairs of every decoder layer, ordered by image and query.

    An image with n objects has `min(Q, n)` pairs, so P is the same in all layers.
    """

    queries: Tensor
    """Numbers of the queries in outputs `(layers, B, Q, ...)` flattened to `(layers·B·Q, ...)`,
    `(layers, P)`."""
    objects: Tensor
    """Numbers of the objects in the batch, `(layers, P)`."""


class HungarianMatcher(nn.Module):
    """Matching of the queries of every image with its objects.

    Args:
        cost_class: Weight of the class probability.
        cost_bbox: Weight of the L1 distance of normalized (cx, cy, w, h).
        cost_giou: Weight of the generalized IoU.

    Raises:
        ValueError: All three are 0.
    """

    def __init__(
        self, cost_class: float = 1.0, cost_bbox: float = 5.0, cost_giou: float = 2.0
    ) -> None:
        super().__init__()
        if cost_class == cost_bbox == cost_giou == 0:
            raise ValueError("cost_class, cost_bbox and cost_giou must not all be 0")
        self.cost_class = cost_class
        self.cost_bbox = cost_bbox
        self.cost_giou = cost_giou

    def forward(
        self, outputs: dict[str, Tensor], targets: Sequence[dict[str, Tensor]]
    ) -> list[tuple[Tensor, Tensor]]:
        """Assign the queries of one decoder layer to objects.

        Args:
            outputs: `pred_logits` `(B, Q, C+1)` and `pred_boxes` `(B, Q, 4)` as normalized
                (cx, cy, w, h).
            targets: `labels` `(n,)` and `boxes` `(n, 4)` of every image.

        Returns:
            For every image two int64 tensors of length `min(Q, n)` on the CPU: the matched queries
            in ascending order, and the object of each.

        Raises:
            ValueError: See `match`.
        """
        logits, boxes = outputs["pred_logits"][None], outputs["pred_boxes"][None]
        (pairs,) = self._assign(logits, boxes, Objects.of(targets))
        return [(torch.from_numpy(i), torch.from_numpy(j)) for i, j in pairs]

    def match(self, logits: Tensor, boxes: Tensor, objects: Objects) -> Matches:
        """Assign queries to objects, separately in each decoder layer.

        Predictions that are not finite are matched too, so that the loss can report them.

        Args:
            logits: Logits of the classes, `(layers, B, Q, C+1)`.
            boxes: Boxes as normalized (cx, cy, w, h), `(layers, B, Q, 4)`.
            objects: The objects of the batch.

        Raises:
            ValueError: A label is not in [0, C), or a width or height is negative.
        """
        layers, images, num_queries = logits.shape[:3]
        first_query = num_queries * np.arange(layers * images).reshape(layers, images)
        first_object = np.cumsum([0, *objects.counts])
        pairs = [
            (first_query[layer, image] + i, first_object[image] + j)
            for layer, assigned in enumerate(self._assign(logits, boxes, objects))
            for image, (i, j) in enumerate(assigned)
        ]
        matched = torch.from_numpy(np.concatenate(pairs, axis=1))  # (2, layers·P)
        matched = copy_from_host(matched, logits.device).unflatten(1, (layers, -1))
        return Matches(*matched)

    @torch.no_grad()
    def _assign(
        self, logits: Tensor, boxes: Tensor, objects: Objects
    ) -> list[list[tuple[np.ndarray, np.ndarray]]]:
        """Return the matched queries and objects for every layer and image."""
        cost = self._cost(logits, boxes, objects)  # (layers, N, Q)
        # One copy has everything that the host must see, because each copy waits for the device.
        parts = [cost, objects.labels, objects.boxes, boxes[..., 2:].amin()]
        host = torch.cat([part.float().flatten() for part in parts]).cpu().numpy()
        ends = np.cumsum([part.numel() for part in parts])
        costs, labels, target, smallest = np.split(host, ends[:-1])
        _check_labels(labels, num_classes=logits.shape[-1] - 1)
        _check_boxes(target.reshape(-1, 4), smallest[0])
        first_object = np.cumsum(objects.counts)[:-1]
        return [
            [linear_sum_assignment(block.T) for block in np.split(layer, first_object)]
            for layer in costs.reshape(cost.shape)
        ]

    def _cost(self, logits: Tensor, boxes: Tensor, objects: Objects) -> Tensor:
        """Return the costs of each object for the queries of its image, `(layers, N, Q)`."""
        probability = logits.float().softmax(-1).transpose(2, 3)  # (layers, B, C+1, Q)
        # A wrong label must not be an index, which ends the process on a GPU.
        labels = objects.labels.clamp(0, probability.shape[2] - 1)
        boxes, target = boxes.float(), objects.boxes.float()[:, None]  # target (N, 1, 4)
        corners = cxcywh_to_xyxy(boxes)[:, objects.images]  # (layers, N, Q, 4)
        boxes = boxes[:, objects.images]  # (layers, N, Q, 4)

        by_class = -probability[:, objects.images, labels]
        by_distance = (boxes - target).abs().sum(-1)
        by_overlap = -generalized_iou(corners, cxcywh_to_xyxy(target))
        cost = (
            self.cost_bbox * by_distance + self.cost_class * by_class + self.cost_giou * by_overlap
        )
        return cost.nan_to_num(_LARGE_COST, _LARGE_COST, -_LARGE_COST)


def _check_labels(labels: np.ndarray, num_classes: int) -> None:
    """Raise ValueError for a label outside [0, C)."""
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if wrong.size:
        raise ValueError(
            f"labels must be in [0, {num_classes}), the classes of the model, got {wrong[0]:.0f}"
        )


def _check_boxes(boxes: np.ndarray, smallest: float) -> None:
    """Raise ValueError if a width or height is negative.

    Args:
        boxes: Boxes of the objects, `(N, 4)`.
        smallest: Smallest width or height of a prediction. The loss reports one that is not finite.
    """
    wrong = boxes[(boxes[:, 2:] < 0).any(1)]
    if wrong.size:
        raise ValueError(
            "boxes must have a width and a height of at least 0, "
            f"got {[float(value) for value in wrong[0]]}"
        )
    if -np.inf < smallest < 0:
        raise ValueError(f"pred_boxes must have no negative width or height, got {smallest:g}")
