"""The set prediction loss of DETR: match queries with objects, then compare the pairs.

Each decoder layer is matched separately. The losses of boxes and masks are divided by the mean
number of objects per process. As published, the cross-entropy is a weighted mean over the queries
of this process.

Source: DETR (Carion et al., ECCV 2020), section 3.1 and appendix A.2. Masks: section 4.4, focal
loss (Lin et al., ICCV 2017) and Dice loss (Milletari et al., 3DV 2016).
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
    """The losses of a batch, with the weight of each in the total loss.

    In training mode all processes must call it together, because they add up their numbers of
    objects. In evaluation mode each process uses its own number, because one process may have more
    batches than another.

    Args:
        num_classes: Number of classes C without no-object. The label of no-object is C.
        matcher: Module that assigns queries to objects.
        weight_dict: Weight of each loss in the total loss, by name.
        eos_coef: Weight of the no-object class in the cross-entropy.
        losses: Groups of losses to compute: `labels`, `boxes`, `cardinality`, `masks`.

    Raises:
        ValueError: A loss is unknown.
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
            raise ValueError(f"losses must be among {allowed}, got {unknown[0]!r}")
        self.num_classes = num_classes
        self.matcher = matcher
        self.weight_dict = weight_dict
        self.eos_coef = eos_coef
        self.losses = tuple(losses)
        class_weights = torch.ones(num_classes + 1)
        class_weights[-1] = eos_coef
        self.register_buffer("class_weights", class_weights, persistent=False)

    def forward(self, outputs: dict, targets: Targets) -> dict[str, Tensor]:
        """Compute the losses, without their weights, and two metrics.

        Args:
            outputs: `pred_logits` `(B, Q, C+1)`, `pred_boxes` `(B, Q, 4)`, with masks also
                `pred_masks` `(B, Q, h, w)`. Optionally `aux_outputs`, a list of such dicts of the
                earlier decoder layers, without masks.
            targets: `labels` `(n,)` and `boxes` `(n, 4)` of every image, with masks also `masks`
                `(n, H, W)`.

        Returns:
            Scalars: the losses `loss_ce`, `loss_bbox`, `loss_giou`, `loss_mask`, `loss_dice`, and
            the metrics `class_error` (percent of the objects) and `cardinality_error`. Those of the
            i-th auxiliary output have the suffix `_i`, without `class_error` and masks.

        Raises:
            ValueError: A label is not in [0, C).
        """
        self._check_labels(targets)
        outputs = map_tensors(_at_least_float32, outputs)
        count = self._object_count(targets, outputs["pred_logits"].device)
        metrics = self._layer_metrics(outputs, targets, count, self.losses)
        aux_losses = [name for name in self.losses if name != "masks"]
        for i, aux in enumerate(outputs.get("aux_outputs", [])):
            layer_metrics = self._layer_metrics(aux, targets, count, aux_losses)
            layer_metrics.pop("class_error", None)
            metrics |= {f"{name}_{i}": value for name, value in layer_metrics.items()}
        return metrics

    def _layer_metrics(
        self, outputs: dict, targets: Targets, count: Tensor, losses: Sequence[str]
    ) -> dict[str, Tensor]:
        """Match the outputs of one decoder layer, and compute its losses and metrics."""
        matches = self.matcher(outputs, targets)
        metrics: dict[str, Tensor] = {}
        for name in losses:
            metrics |= getattr(self, f"_loss_{name}")(outputs, targets, matches, count)
        return metrics

    def _loss_labels(
        self, outputs: dict, targets: Targets, matches: Matches, count: Tensor
    ) -> dict[str, Tensor]:
        """Compute the cross-entropy of all queries, and the percentage of wrong classes."""
        logits = outputs["pred_logits"]
        at = _matched_queries(matches)
        labels = _matched_objects(targets, matches, "labels")
        classes = torch.full(logits.shape[:2], self.num_classes, device=logits.device)
        classes[at] = labels
        weights = self.class_weights.to(logits)
        loss = F.cross_entropy(logits.transpose(1, 2), classes, weights)
        correct = (logits[at].argmax(-1) == labels).sum()
        # A batch without objects has an error of 100, as published.
        return {"loss_ce": loss, "class_error": 100 - 100 * correct / max(len(labels), 1)}

    def _loss_boxes(
        self, outputs: dict, targets: Targets, matches: Matches, count: Tensor
    ) -> dict[str, Tensor]:
        """Compute the L1 distance of (cx, cy, w, h) and 1 - GIoU of the matched pairs."""
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
        """Compute the error of the number of detected objects per image; a metric, not a loss."""
        logits = outputs["pred_logits"]
        predicted = (logits.argmax(-1) != self.num_classes).sum(1).float()
        actual = predicted.new_tensor([len(target["labels"]) for target in targets])
        return {"cardinality_error": F.l1_loss(predicted, actual)}

    def _loss_masks(
        self, outputs: dict, targets: Targets, matches: Matches, count: Tensor
    ) -> dict[str, Tensor]:
        """Compute the focal and Dice losses of the matched pairs, at the size of padded images."""
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
        """Return the mean number of objects per process, at least 1."""
        count = sum(len(target["labels"]) for target in targets)
        total = torch.tensor(float(count), device=device)
        if self.training:
            total = all_reduce_sum(total) / world_size()
        return total.clamp(min=1)

    def _check_labels(self, targets: Targets) -> None:
        """Raise ValueError for a label outside [0, C).

        Without this check, an index out of range on a GPU would end the process without a reason.
        """
        labels = torch.cat([target["labels"] for target in targets])
        if wrong := labels[(labels < 0) | (labels >= self.num_classes)].tolist():
            raise ValueError(
                f"labels must be in [0, {self.num_classes}), the classes of the model, "
                f"got {wrong[0]}"
            )


def _at_least_float32(tensor: Tensor) -> Tensor:
    """Convert half precision to float32, and keep float64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _matched_queries(matches: Matches) -> tuple[Tensor, Tensor]:
    """Return image and query of every matched pair, each `(N,)`."""
    images = [torch.full_like(queries, i) for i, (queries, _) in enumerate(matches)]
    return torch.cat(images), torch.cat([queries for queries, _ in matches])


def _matched_objects(targets: Targets, matches: Matches, name: str) -> Tensor:
    """Return an entry of the targets for every matched pair, `(N, ...)`, in query order."""
    pairs = zip(targets, matches, strict=True)
    return torch.cat([target[name][objects] for target, (_, objects) in pairs])


def _matched_masks(targets: Targets, matches: Matches) -> Tensor:
    """Return the mask of every matched pair, `(N, H, W)`, padded with 0 to the largest image."""
    height = max(target["masks"].shape[-2] for target in targets)
    width = max(target["masks"].shape[-1] for target in targets)
    padded = []
    for target, (_, objects) in zip(targets, matches, strict=True):
        masks = target["masks"][objects]
        padded.append(F.pad(masks, (0, width - masks.shape[-1], 0, height - masks.shape[-2])))
    return torch.cat(padded)
