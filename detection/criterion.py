"""The set prediction loss of DETR: match queries with objects, then compare the pairs.

Each decoder layer is matched separately, but the losses of all layers are computed together. Layer
0 is the last layer of the decoder; it alone has a class error and masks. The losses of boxes and
masks are divided by the mean number of objects per process. As published, the cross-entropy is a
weighted mean over the queries of this process.

Source: DETR (Carion et al., ECCV 2020), section 3.1 and appendix A.2. Masks: section 4.4, focal
loss (Lin et al., ICCV 2017) and Dice loss (Milletari et al., 3DV 2016).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

from detection.boxes import cxcywh_to_xyxy, generalized_iou
from detection.matcher import HungarianMatcher, Matches, Objects
from engine.distributed import all_reduce_sum, world_size
from engine.tensors import copy_from_host

__all__ = ["SetCriterion"]

_LOSSES = ("labels", "boxes", "cardinality", "masks")

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
        matcher: HungarianMatcher,
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
            ValueError: A label is not in [0, C), or the width or height of a box is negative.
        """
        layers = [outputs, *outputs.get("aux_outputs", [])]
        logits = torch.stack([_at_least_float32(layer["pred_logits"]) for layer in layers])
        boxes = torch.stack([_at_least_float32(layer["pred_boxes"]) for layer in layers])
        objects = Objects.of(targets)
        matches = self.matcher.match(logits, boxes, objects)
        count = self._object_count(objects)

        # Each value is (layers,), or (1,) for the last layer of the decoder alone.
        values: dict[str, Tensor] = {}
        if "labels" in self.losses:
            values |= self._loss_labels(logits, objects, matches)
        if "boxes" in self.losses:
            values |= self._loss_boxes(boxes, objects, matches, count)
        if "cardinality" in self.losses:
            values |= self._cardinality(logits, objects)
        if "masks" in self.losses:
            masks = _at_least_float32(outputs["pred_masks"])
            values |= self._loss_masks(masks, targets, matches, count)
        scalars = {name: value.unbind() for name, value in values.items()}
        return {
            f"{name}{suffix}": of_layers[layer]
            for layer, suffix in enumerate(["", *(f"_{i}" for i in range(len(layers) - 1))])
            for name, of_layers in scalars.items()
            if layer < len(of_layers)
        }

    def _loss_labels(self, logits: Tensor, objects: Objects, matches: Matches) -> dict[str, Tensor]:
        """Compute the cross-entropy of all queries, and the percentage of wrong classes.

        `logits` are `(layers, B, Q, C+1)`.
        """
        layers = len(logits)
        logits = logits.flatten(0, 2)
        labels = objects.labels[matches.objects]  # (layers, P)
        classes = torch.full(logits.shape[:1], self.num_classes, device=logits.device)
        classes[matches.queries] = labels
        class_weights = self.class_weights.to(logits)
        losses = F.cross_entropy(logits, classes, class_weights, reduction="none")
        weights = class_weights[classes]
        loss = losses.view(layers, -1).sum(1) / weights.view(layers, -1).sum(1)
        correct = (logits[matches.queries[0]].argmax(-1) == labels[0]).sum()
        # A batch without objects has an error of 100, as published.
        error = 100 - 100 * correct / max(labels.shape[1], 1)
        return {"loss_ce": loss, "class_error": error[None]}

    def _loss_boxes(
        self, boxes: Tensor, objects: Objects, matches: Matches, count: Tensor
    ) -> dict[str, Tensor]:
        """Compute the L1 distance of (cx, cy, w, h) and 1 - GIoU of the matched pairs.

        `boxes` are `(layers, B, Q, 4)`.
        """
        boxes = boxes.flatten(0, 2)[matches.queries]  # (layers, P, 4)
        target = objects.boxes.to(boxes.dtype)[matches.objects]  # (layers, P, 4)
        distance = F.l1_loss(boxes, target, reduction="none").sum((1, 2))
        giou = generalized_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(target))
        return {"loss_bbox": distance / count, "loss_giou": (1 - giou).sum(1) / count}

    @torch.no_grad()
    def _cardinality(self, logits: Tensor, objects: Objects) -> dict[str, Tensor]:
        """Compute the error of the number of detected objects per image; a metric, not a loss."""
        predicted = (logits.argmax(-1) != self.num_classes).sum(2)  # (layers, B)
        actual = copy_from_host(torch.tensor(objects.counts), logits.device)
        return {"cardinality_error": (predicted - actual).abs().float().mean(1)}

    def _loss_masks(
        self, masks: Tensor, targets: Targets, matches: Matches, count: Tensor
    ) -> dict[str, Tensor]:
        """Compute the focal and Dice losses of the matched pairs, at the size of padded images.

        `masks` are `(B, Q, h, w)`.
        """
        logits = masks.flatten(0, 1)[matches.queries[0]]  # (P, h, w)
        target = _padded_masks(targets)[matches.objects[0]].to(logits)  # (P, H, W)
        resized = F.interpolate(logits[:, None], target.shape[-2:], mode="bilinear")
        logits, target = resized.flatten(1), target.flatten(1)
        focal = sigmoid_focal_loss(logits, target).mean(1).sum()
        probability = logits.sigmoid()
        overlap = 2 * (probability * target).sum(1)
        dice = 1 - (overlap + 1) / (probability.sum(1) + target.sum(1) + 1)
        return {"loss_mask": (focal / count)[None], "loss_dice": (dice.sum() / count)[None]}

    def _object_count(self, objects: Objects) -> Tensor:
        """Return the mean number of objects per process, at least 1."""
        total = torch.full((), float(sum(objects.counts)), device=objects.labels.device)
        if self.training:
            total = all_reduce_sum(total) / world_size()
        return total.clamp(min=1)


def _at_least_float32(tensor: Tensor) -> Tensor:
    """Convert half precision to float32, and keep float64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _padded_masks(targets: Targets) -> Tensor:
    """Return the masks of all objects, `(N, H, W)`, padded with 0 to the largest image."""
    height = max(target["masks"].shape[-2] for target in targets)
    width = max(target["masks"].shape[-1] for target in targets)
    padded = [
        F.pad(masks, (0, width - masks.shape[-1], 0, height - masks.shape[-2]))
        for masks in (target["masks"] for target in targets)
    ]
    return torch.cat(padded)
