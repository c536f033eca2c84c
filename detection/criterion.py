"""DETR's set prediction loss: match queries with objects, then compare pair by pair.

Carion et al., "End-to-End Object Detection with Transformers" (ECCV 2020), section 3.1 and appendix
A.2; masks: section 4.4, focal loss (Lin et al., ICCV 2017) and Dice (Milletari et al., 3DV 2016).
Every decoder layer is matched and judged by itself. Box and mask losses are divided by the number
of objects of all processes; the cross-entropy is a weighted mean over this process's queries, as
published.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from detection.boxes import cxcywh_to_xyxy
from engine.distributed import all_reduce_sum, world_size
from engine.tensors import map_tensors

__all__ = ["SetCriterion"]

_LOSSES = ("labels", "boxes", "cardinality", "masks")

Matches = list[tuple[Tensor, Tensor]]
Targets = list[dict[str, Tensor]]


class SetCriterion(nn.Module):
    """The losses of a batch, by name; `weight_dict` says which of them count, and how much.

    In training mode all processes call it together, since they add up their numbers of objects. In
    evaluation mode, where one process may have more batches than another, each divides by its own.

    Args:
        num_classes: C, without the no-object class, whose number is C.
        matcher: Assigns queries to objects.
        weight_dict: Weight of each loss in the total.
        eos_coef: Weight of the no-object class in the cross-entropy.
        losses: Some of `labels`, `boxes`, `cardinality`, `masks`.

    Raises:
        ValueError: A loss is not known.
    """

    def __init__(
        self,
        num_classes: int,
        matcher: nn.Module,
        weight_dict: dict[str, float],
        eos_coef: float,
        losses: Sequence[str],
    ) -> None:
        super().__init__()
        if unknown := [name for name in losses if name not in _LOSSES]:
            allowed = ", ".join(_LOSSES)
            raise ValueError(f"losses has {unknown[0]!r} but should hold some of {allowed}")
        self.num_classes = num_classes
        self.matcher = matcher
        self.weight_dict = weight_dict
        self.eos_coef = eos_coef
        self.losses = tuple(losses)
        class_weights = torch.ones(num_classes + 1)
        class_weights[-1] = eos_coef
        self.register_buffer("class_weights", class_weights, persistent=False)

    def forward(self, outputs: dict, targets: Targets) -> dict[str, Tensor]:
        """Compute the losses, unweighted.

        Args:
            outputs: `pred_logits` `(B, Q, C+1)`, `pred_boxes` `(B, Q, 4)`, with masks `pred_masks`
                `(B, Q, h, w)`, and perhaps `aux_outputs`, a list of such dicts without masks.
            targets: Of every image `labels` `(n,)`, `boxes` `(n, 4)`, with masks `masks`
                `(n, H, W)`.

        Returns:
            Scalars `loss_ce`, `class_error` (percent of the objects), `loss_bbox`, `loss_giou`,
            `cardinality_error`, `loss_mask`, `loss_dice`; and of the i-th auxiliary output the
            same with `_i`, without `class_error` and masks.

        Raises:
            ValueError: A label is not a class number.
        """
        self._check_labels(targets)
        outputs = map_tensors(_at_least_float32, outputs)
        count = self._object_count(targets, outputs["pred_logits"].device)
        figures = self._of_layer(outputs, targets, count, self.losses)
        aux_losses = [name for name in self.losses if name != "masks"]
        for i, aux in enumerate(outputs.get("aux_outputs", [])):
            of_layer = self._of_layer(aux, targets, count, aux_losses)
            of_layer.pop("class_error", None)
            figures |= {f"{name}_{i}": value for name, value in of_layer.items()}
        return figures

    def _of_layer(
        self, outputs: dict, targets: Targets, count: Tensor, losses: Sequence[str]
    ) -> dict[str, Tensor]:
        matches = self.matcher(outputs, targets)
        figures: dict[str, Tensor] = {}
        for name in losses:
            figures |= getattr(self, f"_loss_{name}")(outputs, targets, matches, count)
        return figures

    def _loss_labels(
        self, outputs: dict, targets: Targets, matches: Matches, count: Tensor
    ) -> dict[str, Tensor]:
        """Cross-entropy of all queries, and how often the class of an object is missed."""
        logits = outputs["pred_logits"]
        at = _matched_queries(matches)
        labels = _matched_objects(targets, matches, "labels")
        classes = torch.full(logits.shape[:2], self.num_classes, device=logits.device)
        classes[at] = labels
        weights = self.class_weights.to(logits)
        loss = F.cross_entropy(logits.transpose(1, 2), classes, weights)
        correct = (logits[at].argmax(-1) == labels).sum()
        # An image without objects counts as all wrong, as published.
        return {"loss_ce": loss, "class_error": 100 - 100 * correct / max(len(labels), 1)}

    def _loss_boxes(
        self, outputs: dict, targets: Targets, matches: Matches, count: Tensor
    ) -> dict[str, Tensor]:
        """L1 distance on (cx, cy, w, h), and 1 - GIoU, of the matched pairs."""
        boxes = outputs["pred_boxes"][_matched_queries(matches)]
        target = _matched_objects(targets, matches, "boxes").to(boxes.dtype)
        giou = generalized_box_iou_loss(
            cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(target), reduction="sum", eps=0.0
        )
        return {
            "loss_bbox": F.l1_loss(boxes, target, reduction="sum") / count,
            "loss_giou": giou / count,
        }

    @torch.no_grad()
    def _loss_cardinality(
        self, outputs: dict, targets: Targets, matches: Matches, count: Tensor
    ) -> dict[str, Tensor]:
        """By how many objects the number of predictions is wrong; a figure, not a loss."""
        logits = outputs["pred_logits"]
        predicted = (logits.argmax(-1) != self.num_classes).sum(1).float()
        actual = predicted.new_tensor([len(target["labels"]) for target in targets])
        return {"cardinality_error": F.l1_loss(predicted, actual)}

    def _loss_masks(
        self, outputs: dict, targets: Targets, matches: Matches, count: Tensor
    ) -> dict[str, Tensor]:
        """Focal and Dice loss of the matched pairs, at the size of the padded images."""
        logits = outputs["pred_masks"][_matched_queries(matches)]
        target = _matched_masks(targets, matches).to(logits)
        resized = F.interpolate(logits[:, None], target.shape[-2:], mode="bilinear")
        logits, target = resized.flatten(1), target.flatten(1)
        focal = sigmoid_focal_loss(logits, target).mean(1).sum()
        probability = logits.sigmoid()
        overlap = 2 * (probability * target).sum(1)
        dice = 1 - (overlap + 1) / (probability.sum(1) + target.sum(1) + 1)
        return {"loss_mask": focal / count, "loss_dice": dice.sum() / count}

    def _object_count(self, targets: Targets, device: torch.device) -> Tensor:
        """Objects per process, on average, and at least 1."""
        count = sum(len(target["labels"]) for target in targets)
        total = torch.tensor(float(count), device=device)
        if self.training:
            total = all_reduce_sum(total) / world_size()
        return total.clamp(min=1)

    def _check_labels(self, targets: Targets) -> None:
        labels = torch.cat([target["labels"] for target in targets])
        # Checked here, because on a GPU an index out of range ends the process without a reason.
        if wrong := labels[(labels < 0) | (labels >= self.num_classes)].tolist():
            raise ValueError(
                f"labels hold {wrong[0]} but should be in [0, {self.num_classes}), "
                "the class numbers of the model"
            )


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _matched_queries(matches: Matches) -> tuple[Tensor, Tensor]:
    """Image and query of every matched pair, each `(N,)`."""
    images = [torch.full_like(queries, i) for i, (queries, _) in enumerate(matches)]
    return torch.cat(images), torch.cat([queries for queries, _ in matches])


def _matched_objects(targets: Targets, matches: Matches, name: str) -> Tensor:
    """An entry of the targets for every matched pair, `(N, ...)`, in the order of the queries."""
    pairs = zip(targets, matches, strict=True)
    return torch.cat([target[name][objects] for target, (_, objects) in pairs])


def _matched_masks(targets: Targets, matches: Matches) -> Tensor:
    """The masks of every matched pair, `(N, H, W)`, padded with 0 to the largest image."""
    height = max(target["masks"].shape[-2] for target in targets)
    width = max(target["masks"].shape[-1] for target in targets)
    padded = []
    for target, (_, objects) in zip(targets, matches, strict=True):
        masks = target["masks"][objects]
        padded.append(F.pad(masks, (0, width - masks.shape[-1], 0, height - masks.shape[-2])))
    return torch.cat(padded)
