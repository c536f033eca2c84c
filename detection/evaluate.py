"""Losses and COCO figures over a validation set, the same for any number of processes.

By default an image is evaluated as if it were alone: images of a batch go through the model without
padding, together with those of the same size, so that the batch size changes no figure. The
published protocol pads every batch to its largest image; DETR masks the padding in its attention,
but convolutions see it, and figures move a little with the batch size.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from detection.coco_eval import CocoEvaluator
from engine import all_gather_object, autocast, copy_to, unwrap
from engine.tensors import map_tensors

__all__ = ["evaluate"]

Batch = tuple[Tensor, Tensor, list[dict[str, Tensor]]]


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
) -> dict[str, float]:
    """Evaluate a detector; all processes call it.

    Args:
        model: Of `(images, mask)`; left in the mode it was in.
        criterion: The losses, with their `weight_dict`; left in the mode it was in.
        postprocessors: `bbox`, and for masks `segm`.
        loader: Batches `(images (B, 3, H, W), mask (B, H, W), targets)` of this process; images
            fill the top left corner, as large as the target's `size` says.
        evaluator: Emptied first.
        device: Where the model is.
        dtype: Of autocast; float32 for none.
        pad_to_batch: Whether images keep the padding of their batch, and losses are computed per
            batch: the published protocol.

    Returns:
        `loss` (weighted sum) and every figure of the criterion, averaged over images (over batches
        with `pad_to_batch`), `class_error` over objects; then COCO's twelve figures, `AP` and so on
        for boxes, `segm_AP` and so on for masks.
    """
    model = unwrap(model)
    modes = [(module, module.training) for module in (model, criterion)]
    model.eval()
    criterion.eval()
    evaluator.reset()
    losses = _Losses(criterion.weight_dict)
    for whole in loader:
        for images, mask, targets in [whole] if pad_to_batch else _unpadded(*whole):
            with autocast(device, dtype):
                outputs = model(images.to(device), mask.to(device))
            outputs = map_tensors(Tensor.float, outputs)
            found = _postprocess(postprocessors, outputs, targets)
            evaluator.update(dict(zip(_image_ids(targets), found, strict=True)))
            for part, its_targets in _judged(outputs, targets, whole_batch=pad_to_batch):
                losses.add(its_targets, criterion(part, copy_to(its_targets, device)))
    for module, training in modes:
        module.train(training)
    by_iou_type = evaluator.metrics()
    figures = losses.averages()
    for iou_type, values in by_iou_type.items():
        prefix = "" if iou_type == "bbox" else f"{iou_type}_"
        figures |= {f"{prefix}{name}": value for name, value in values.items()}
    return figures


def _unpadded(images: Tensor, mask: Tensor, targets: list[dict[str, Tensor]]) -> Iterator[Batch]:
    """The parts of a batch whose images have the same size, cut to that size."""
    groups: dict[tuple[int, int], list[int]] = {}
    for i, target in enumerate(targets):
        height, width = target["size"].tolist()
        groups.setdefault((height, width), []).append(i)
    for (height, width), chosen in groups.items():
        cut = (chosen, ..., slice(height), slice(width))
        yield images[cut], mask[cut], [targets[i] for i in chosen]


def _judged(
    outputs: dict[str, Any], targets: list[dict[str, Tensor]], *, whole_batch: bool
) -> Iterator[tuple[dict[str, Any], list[dict[str, Tensor]]]]:
    """What the criterion gets at once: everything, or one image after the other."""
    if whole_batch:
        yield outputs, targets
        return
    for i, target in enumerate(targets):
        yield map_tensors(lambda tensor, i=i: tensor[i : i + 1], outputs), [target]


def _postprocess(
    postprocessors: Mapping[str, nn.Module],
    outputs: dict[str, Any],
    targets: list[dict[str, Tensor]],
) -> list[dict[str, Tensor]]:
    original_sizes = torch.stack([target["orig_size"] for target in targets])
    found = postprocessors["bbox"](outputs, original_sizes)
    if "segm" in postprocessors:
        sizes = torch.stack([target["size"] for target in targets])
        found = postprocessors["segm"](found, outputs, original_sizes, sizes)
    return found


def _image_ids(targets: list[dict[str, Tensor]]) -> list[int]:
    return [int(target["image_id"]) for target in targets]


class _Losses:
    """Losses per image (or batch), kept on the device and averaged in the order of image ids."""

    def __init__(self, weight_dict: Mapping[str, float]) -> None:
        self._weight_dict = weight_dict
        self._names: list[str] = []
        self._ids: list[tuple[int, ...]] = []
        self._objects: list[int] = []
        self._rows: list[Tensor] = []

    def add(self, targets: list[dict[str, Tensor]], figures: dict[str, Tensor]) -> None:
        self._names = list(figures)
        self._ids.append(tuple(_image_ids(targets)))
        self._objects.append(sum(len(target["labels"]) for target in targets))
        self._rows.append(torch.stack([value.double() for value in figures.values()]))

    def averages(self) -> dict[str, float]:
        """Averages over all processes, in float64 and one order, so always the same."""
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
