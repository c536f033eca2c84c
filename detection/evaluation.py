"""Losses and COCO metrics over a validation set, equal for any number of processes.

By default images are not padded: the model gets the images of a batch in groups of the same size,
so the metrics do not depend on the batch size. The published protocol pads every batch to its
largest image. The attention masks the padding but the convolutions do not, so the metrics of the
published protocol depend slightly on the batch size.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from datasets import normalize_batch
from detection.coco_eval import CocoEvaluator
from engine import all_gather_object, autocast, copy_to, unwrap
from engine.tensors import map_tensors

__all__ = ["evaluate"]

Batch = tuple[Tensor, Tensor, list[dict[str, Tensor]]]
OnImages = Callable[[Tensor, list[dict[str, Tensor]], list[dict[str, Tensor]]], None]


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    criterion: nn.Module,
    postprocessors: Mapping[str, nn.Module],
    loader: DataLoader,
    evaluator: CocoEvaluator,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    pad_to_batch: bool = False,
    on_images: OnImages | None = None,
) -> dict[str, float]:
    """Evaluate a detector; all processes must call it.

    Args:
        model: Detector that is called with `(images, mask)`. Its mode is restored.
        criterion: The losses, with their `weight_dict`. Its mode is restored.
        postprocessors: `bbox`, and for masks also `segm`.
        loader: Batches `(images (B, 3, H, W), mask (B, H, W), targets)` of this process. An image
            of the `size` of its target is in the top left corner; the rest is padding. The images
            are uint8, or normalized.
        evaluator: Collects the detections; it is reset first.
        device: Device of the model.
        dtype: Data type of automatic mixed precision; float32 disables it.
        pad_to_batch: Use the published protocol: images keep the padding of their batch, and losses
            are computed per batch.
        on_images: Called with images, targets and their detections, for example to draw them.

    Returns:
        `loss` (the weighted sum) and every loss and metric of the criterion, averaged over images
        (over batches with `pad_to_batch`), `class_error` over objects. Then the twelve COCO
        metrics: `AP` and so on for boxes, `segm_AP` and so on for masks.
    """
    model = unwrap(model)
    modes = [(module, module.training) for module in (model, criterion)]
    model.eval()
    criterion.eval()
    evaluator.reset()
    losses = _Losses(criterion.weight_dict)
    for batch in loader:
        for images, mask, targets in [batch] if pad_to_batch else _split_by_size(*batch):
            mask = mask.to(device)
            with autocast(device, dtype):
                outputs = model(normalize_batch(images.to(device), mask), mask)
            outputs = map_tensors(Tensor.float, outputs)
            detections = _postprocess(postprocessors, outputs, targets)
            evaluator.update(dict(zip(_image_ids(targets), detections, strict=True)))
            if on_images is not None:
                on_images(images, targets, detections)
            parts = [(outputs, targets)] if pad_to_batch else _split_by_image(outputs, targets)
            for part, part_targets in parts:
                losses.add(part_targets, criterion(part, copy_to(part_targets, device)))
    for module, training in modes:
        module.train(training)
    coco_metrics = evaluator.metrics()
    metrics = losses.averages()
    for iou_type, values in coco_metrics.items():
        prefix = "" if iou_type == "bbox" else f"{iou_type}_"
        metrics |= {f"{prefix}{name}": value for name, value in values.items()}
    return metrics


def _split_by_size(
    images: Tensor, mask: Tensor, targets: list[dict[str, Tensor]]
) -> Iterator[Batch]:
    """Yield groups of images of the same size, without padding."""
    groups: dict[tuple[int, int], list[int]] = {}
    for i, target in enumerate(targets):
        height, width = target["size"].tolist()
        groups.setdefault((height, width), []).append(i)
    for (height, width), members in groups.items():
        cut = (members, ..., slice(height), slice(width))
        yield images[cut], mask[cut], [targets[i] for i in members]


def _split_by_image(
    outputs: dict[str, Any], targets: list[dict[str, Tensor]]
) -> Iterator[tuple[dict[str, Any], list[dict[str, Tensor]]]]:
    """Yield the outputs and the target of one image at a time."""
    if len(targets) == 1:
        yield outputs, targets
        return
    for i, target in enumerate(targets):
        yield map_tensors(lambda tensor, i=i: tensor[i : i + 1], outputs), [target]


def _postprocess(
    postprocessors: Mapping[str, nn.Module],
    outputs: dict[str, Any],
    targets: list[dict[str, Tensor]],
) -> list[dict[str, Tensor]]:
    """Return the detections of every image, in pixels of the original image."""
    original_sizes = torch.stack([target["orig_size"] for target in targets])
    detections = postprocessors["bbox"](outputs, original_sizes)
    if "segm" in postprocessors:
        sizes = torch.stack([target["size"] for target in targets])
        detections = postprocessors["segm"](detections, outputs, original_sizes, sizes)
    return detections


def _image_ids(targets: list[dict[str, Tensor]]) -> list[int]:
    """Return the ids of the images of some targets."""
    return [int(target["image_id"]) for target in targets]


class _Losses:
    """Losses per image (or batch), kept on the device and averaged in the order of image ids."""

    def __init__(self, weight_dict: Mapping[str, float]) -> None:
        self._weight_dict = weight_dict
        self._names: list[str] = []
        self._ids: list[tuple[int, ...]] = []
        self._objects: list[int] = []
        self._rows: list[Tensor] = []

    def add(self, targets: list[dict[str, Tensor]], losses: dict[str, Tensor]) -> None:
        """Add the losses of the images of some targets."""
        self._names = list(losses)
        self._ids.append(tuple(_image_ids(targets)))
        self._objects.append(sum(len(target["labels"]) for target in targets))
        self._rows.append(torch.stack([*losses.values()]).double())

    def averages(self) -> dict[str, float]:
        """Return the averages over all processes, summed in float64 in a fixed order."""
        rows = torch.stack(self._rows).cpu() if self._rows else torch.zeros(0, 0)
        own = dict(zip(self._ids, zip(self._objects, rows, strict=True), strict=True))
        merged: dict[tuple[int, ...], tuple[int, Tensor]] = {}
        names: list[str] = []
        for their_names, theirs in all_gather_object((self._names, own)):
            names = names or their_names
            merged = theirs | merged
        objects, rows = zip(*(merged[ids] for ids in sorted(merged)), strict=True)
        columns = torch.stack(rows).unbind(1)
        by_object = torch.tensor(objects, dtype=torch.float64)
        averages = {
            name: (
                (column @ by_object / by_object.sum().clamp(min=1)).item()
                if name == "class_error"
                else column.mean().item()
            )
            for name, column in zip(names, columns, strict=True)
        }
        total = sum(self._weight_dict.get(name, 0.0) * value for name, value in averages.items())
        return {"loss": total, **averages}
