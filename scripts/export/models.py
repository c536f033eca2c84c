"""Build the model of a checkpoint for an export, from its `args` and the options of the trainer."""

from collections.abc import Iterable

import torch
from pydantic import Field, field_validator
from torch import Tensor

from classification.config import ClassificationConfig
from classification.restore import restore as restore_classifier
from classification.restore import restore_published
from detection.config import DetectionConfig
from detection.restore import restore as restore_detector
from detection.segmentation import DETRSegmentation
from engine import Config, UsageError, UserError
from scripts.export.program import Exportable

__all__ = [
    "ClassifierExport",
    "DetectorExport",
    "ExportOptions",
    "classifier",
    "detector",
]


class ExportOptions(Config):
    """Export."""

    checkpoint: str = ""
    """Path or URL of the checkpoint to export."""
    output: str
    """Output file, ending in .pt2 or .onnx."""
    # From opset 23 attention is one operator, and onnxruntime does not broadcast DETR's mask in it.
    opset: int = Field(18, ge=18, le=22)
    """ONNX opset version."""
    use_ema: bool = False
    """Export the EMA weights of the checkpoint."""

    @field_validator("output")
    @classmethod
    def _check_output(cls, output: str) -> str:
        """Refuse a file name of another format."""
        if not output.endswith((".pt2", ".onnx")):
            raise ValueError("must end in .pt2 (torch.export) or .onnx")
        return output


class ClassifierExport(ExportOptions, ClassificationConfig):
    """Options of a classifier's export. Only the model options of the trainer have an effect."""


class DetectorExport(ExportOptions, DetectionConfig):
    """Options of a detector's export. Only the model options of the trainer have an effect."""


def classifier(options: ClassifierExport, checkpoint: dict | None) -> Exportable:
    """Build the classifier of a checkpoint, or the published one without a checkpoint.

    Raises:
        UsageError: Options exclude each other, or do not describe the model.
        UserError: The checkpoint has no weights of the requested kind.
        CheckpointError: The weights do not fit the model.
    """
    if checkpoint is None:
        if "model" not in options.model_fields_set:
            raise UsageError("--pretrained needs --model, the name of the published model")
        model, metadata = restore_published(options)
    else:
        weights = _weights(options, checkpoint)
        head = weights.get("head.weight")
        if head is None or head.ndim != 2:
            raise UserError(
                f"{options.checkpoint} holds neither a classifier (a matrix head.weight) nor a "
                "detector (a matrix class_embed.weight)"
            )
        model, metadata = restore_classifier(options, checkpoint, weights, options.checkpoint)

    def samples() -> Iterable[tuple[Tensor, ...]]:
        for batch in (2, 1, 3):
            yield (torch.randn(batch, 3, *metadata["image_size"]),)

    return Exportable(model, {"images": {0: "batch"}}, ("logits",), samples, metadata)


def detector(options: DetectorExport, checkpoint: dict) -> Exportable:
    """Build the detector of a checkpoint, without the predictions of intermediate decoder layers.

    Raises:
        UsageError: Options exclude each other, or do not describe the model.
        UserError: The checkpoint has no weights of the requested kind.
        CheckpointError: The weights do not fit the model.
    """
    weights = _weights(options, checkpoint)
    model, metadata = restore_detector(options, checkpoint, weights, options.checkpoint)
    inputs = {
        "images": {0: "batch", 2: "height", 3: "width"},
        "mask": {0: "batch", 1: "height", 2: "width"},
    }
    outputs = ("pred_logits", "pred_boxes") + ("pred_masks",) * isinstance(model, DETRSegmentation)
    return Exportable(model, inputs, outputs, _padded_images, metadata)


def _padded_images() -> Iterable[tuple[Tensor, ...]]:
    """Yield padded batches `(B, 3, height, width)` and their masks `(B, height, width)`."""
    for sizes in (
        [(192, 256), (160, 224)],
        [(256, 180)],
        [(333, 250), (300, 200), (190, 250)],
    ):
        height, width = (max(side) for side in zip(*sizes, strict=True))
        images = torch.zeros(len(sizes), 3, height, width)
        mask = torch.ones(len(sizes), height, width, dtype=torch.bool)
        for i, (h, w) in enumerate(sizes):
            images[i, :, :h, :w] = torch.randn(3, h, w)
            mask[i, :h, :w] = False
        yield images, mask


def _weights(options: ExportOptions, checkpoint: dict) -> dict[str, Tensor]:
    """Return the weights to export: those of the model or its EMA."""
    weights = checkpoint.get("model_ema") if options.use_ema else checkpoint["model"]
    if weights is None:
        raise UserError(f"--use-ema: {options.checkpoint} has no EMA weights (model_ema)")
    return weights
