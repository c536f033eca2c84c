"""Build the model of a checkpoint for an export, from its `args` and the options of the trainer."""

from collections.abc import Iterable

import timm
import torch
from pydantic import Field, ValidationError, field_validator
from torch import Tensor

from classification.build import create_model
from classification.config import ClassificationConfig, ModelConfig
from detection.build import build_network
from detection.config import BackboneConfig, DetectionConfig, TransformerConfig
from engine import Config, UsageError, UserError
from irpe_core import load_weights
from scripts.export.program import Exportable

__all__ = [
    "ClassifierExport",
    "DetectorExport",
    "ExportOptions",
    "class_head",
    "classifier",
    "detector",
]

# Options of a training run, which the model does not depend on.
_RUN_OPTIONS = {"pretrained", "finetune", "rpe_implementation"}


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
        num_classes = timm.models.get_pretrained_cfg_value(options.model, "num_classes")
        model = create_model(options, num_classes)
    else:
        weights = _weights(options, checkpoint)
        head = weights.get("head.weight")
        if head is None or head.ndim != 2:
            raise UserError(
                f"{options.checkpoint} holds neither a classifier (a matrix head.weight) nor a "
                "detector (a matrix class_embed.weight)"
            )
        options = _complete(options, checkpoint, [ModelConfig], needed="model")
        model = create_model(options, len(head), {"model": weights})

    def samples() -> Iterable[tuple[Tensor, ...]]:
        for batch in (2, 1, 3):
            yield (torch.randn(batch, 3, *options.image_size),)

    return Exportable(model, {"images": {0: "batch"}}, ("logits",), samples)


def detector(options: DetectorExport, checkpoint: dict) -> Exportable:
    """Build the detector of a checkpoint, without the predictions of intermediate decoder layers.

    Raises:
        UsageError: Options exclude each other, or do not describe the model.
        UserError: The checkpoint has no weights of the requested kind.
        CheckpointError: The weights do not fit the model.
    """
    weights = _weights(options, checkpoint)
    head = class_head(weights)
    if head is None:
        raise UserError(
            f"--use-ema: the EMA weights of {options.checkpoint} must be those of a detector (a "
            "matrix class_embed.weight)"
        )
    has_tables = any("lookup_table" in name for name in weights)
    needed = "enc_rpe2d" if has_tables else None
    options = _complete(options, checkpoint, [BackboneConfig, TransformerConfig], needed=needed)
    options = options.model_copy(update={"num_classes": len(head) - 1, "aux_loss": False})
    try:
        model = build_network(options, load=False)
    except ValueError as error:
        raise UsageError(str(error)) from error
    load_weights(model, weights)
    inputs = {
        "images": {0: "batch", 2: "height", 3: "width"},
        "mask": {0: "batch", 1: "height", 2: "width"},
    }
    outputs = ("pred_logits", "pred_boxes") + ("pred_masks",) * options.masks
    return Exportable(model, inputs, outputs, _padded_images)


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


def class_head(weights: dict[str, Tensor]) -> Tensor | None:
    """Return the weight matrix of a detector's class head, None for other models."""
    found = (w for name, w in weights.items() if name.endswith("class_embed.weight"))
    return next((w for w in found if w.ndim == 2), None)


def _weights(options: ExportOptions, checkpoint: dict) -> dict[str, Tensor]:
    """Return the weights to export: those of the model or its EMA."""
    weights = checkpoint.get("model_ema") if options.use_ema else checkpoint["model"]
    if weights is None:
        raise UserError(f"--use-ema: {options.checkpoint} has no EMA weights (model_ema)")
    return weights


def _complete(
    options: ExportOptions, checkpoint: dict, groups: list[type[Config]], needed: str | None
) -> ExportOptions:
    """Take the options that were not given from the `args` of the checkpoint.

    Args:
        options: Flags and values of the `--config` file.
        checkpoint: A checkpoint with or without `args`.
        groups: Option groups that describe the model.
        needed: Option that must be given in one of the two places.

    Raises:
        UsageError: `needed` is not given.
        UserError: A value in `args` is not allowed.
    """
    args = checkpoint.get("args") or {}
    shape = {name for group in groups for name in group.model_fields} - _RUN_OPTIONS
    values = {name: args[name] for name in shape if name in args}
    values |= {name: getattr(options, name) for name in options.model_fields_set}
    if needed and needed not in values:
        raise UsageError(f"{options.checkpoint} does not name its {needed}: give --{needed}")
    try:
        return type(options).model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"]))
        raise UserError(f"args of {options.checkpoint}: {place}: {problem['msg']}") from error
