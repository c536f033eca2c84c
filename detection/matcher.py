"""The matcher: a one-to-one assignment of queries to objects with the lowest total cost.

    cost(i, j) = -cost_class·p_i(class_j) + cost_bbox·|b_i - b_j|_1 - cost_giou·GIoU(b_i, b_j)

This is the cost of query i for object j, with the probability itself instead of its logarithm.
scipy finds the assignment.

Source: DETR (Carion et al., ECCV 2020), section 3.1, Eq. 1.
"""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from detection.boxes import cxcywh_to_xyxy, pairwise_giou

__all__ = ["HungarianMatcher"]

# Replaces costs that are not finite: larger than any other cost, but finite when added up.
_LARGE_COST = 1e6


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

    @torch.no_grad()
    def forward(
        self, outputs: dict[str, Tensor], targets: list[dict[str, Tensor]]
    ) -> list[tuple[Tensor, Tensor]]:
        """Assign queries to objects.

        Predictions that are not finite are matched too, so that the loss can report them.

        Args:
            outputs: `pred_logits` `(B, Q, C+1)` and `pred_boxes` `(B, Q, 4)` as normalized
                (cx, cy, w, h).
            targets: `labels` `(n,)` and `boxes` `(n, 4)` of every image.

        Returns:
            For every image two int64 tensors of length `min(Q, n)` on the CPU: the matched queries
            in ascending order, and the object of each.

        Raises:
            ValueError: The width or height of a box is negative.
        """
        cost = self._cost(outputs, targets).nan_to_num(_LARGE_COST, _LARGE_COST, -_LARGE_COST)
        sizes = [len(target["labels"]) for target in targets]
        blocks = cost.cpu().split(sizes, dim=-1)
        pairs = [linear_sum_assignment(block[i].numpy()) for i, block in enumerate(blocks)]
        return [(torch.from_numpy(i).long(), torch.from_numpy(j).long()) for i, j in pairs]

    def _cost(self, outputs: dict[str, Tensor], targets: list[dict[str, Tensor]]) -> Tensor:
        """Return the costs `(B, Q, N)` of all queries for the N objects of the batch, float32."""
        logits, boxes = outputs["pred_logits"].float(), outputs["pred_boxes"].float()
        probability = logits.flatten(0, 1).softmax(-1)
        boxes = boxes.flatten(0, 1)
        target_labels = torch.cat([target["labels"] for target in targets])
        target_boxes = torch.cat([target["boxes"] for target in targets]).float()

        by_class = -probability[:, target_labels]
        by_distance = torch.cdist(boxes, target_boxes, p=1)
        by_overlap = -pairwise_giou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(target_boxes))
        cost = (
            self.cost_bbox * by_distance + self.cost_class * by_class + self.cost_giou * by_overlap
        )
        return cost.unflatten(0, logits.shape[:2])
