"""Write a trained model as an exported program (`.pt2`) or as ONNX (`.onnx`), and check the file.

    python -m scripts.export --checkpoint outputs/checkpoint.pth --output model.onnx
    python -m scripts.export --checkpoint rpe-2.0-product-ctx-1-k.pth \\
        --enc_rpe2d rpe-2.0-product-ctx-1-k --output detector.pt2
    python -m scripts.export --pretrained --output classifier.onnx \\
        --model deit_tiny_patch16_224_ctx_product_50_shared_k

A classifier maps `images (B, 3, H, W)`, of the size it was built for, to `logits`. A detector maps
`images` and `mask (B, H, W)`, True on padding, of any size, to `pred_logits` and `pred_boxes`; of a
checkpoint with masks to `pred_masks`, too. The model is the one of the checkpoint's `args`; what
they do not tell is given by the trainer's own flags or `--config`.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import timm
import torch
from pydantic import Field, ValidationError, field_validator
from torch import Tensor

from classification.build import create_model
from classification.config import ClassificationConfig, ModelConfig
from detection.config import BackboneConfig, DetectionConfig, TransformerConfig
from detection.detr import build_network
from engine import Config, UsageError, UserError, check_writable, parse_config, run
from irpe_core import CheckpointError, load_checkpoint, load_weights
from scripts.export.program import Exportable, export, require_onnx

# Of a run, not of the model that it trained.
_OF_RUN = {"pretrained", "finetune", "rpe_implementation"}


class ExportOptions(Config):
    """Export"""

    checkpoint: str = ""
    """Trained weights, a path or an address."""
    output: str
    """File to write, which ends in .pt2 or .onnx."""
    # From 23 on attention is one operator, which in onnxruntime does not broadcast DETR's mask.
    opset: int = Field(18, ge=18, le=22)
    """Version of ONNX's operators."""
    use_ema: bool = False
    """Export the moving average of the weights."""

    @field_validator("output")
    @classmethod
    def _known_format(cls, output: str) -> str:
        if not output.endswith((".pt2", ".onnx")):
            raise ValueError("should end in .pt2 (torch.export) or .onnx")
        return output


class ClassifierExport(ExportOptions, ClassificationConfig):
    """Export of a classifier; of the trainer's options those of the model count."""


class DetectorExport(ExportOptions, DetectionConfig):
    """Export of a detector; of the trainer's options those of the model count."""


def main(argv: Sequence[str] | None = None) -> None:
    """Export what the flags say."""
    argv = sys.argv[1:] if argv is None else list(argv)
    # The checkpoint tells whose flags the rest of them are.
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--checkpoint", nargs="?")
    source = finder.parse_known_args(argv)[0].checkpoint
    checkpoint = load_checkpoint(source) if source else None
    detects = checkpoint is not None and _class_head(checkpoint["model"]) is not None
    options = parse_config(
        DetectorExport if detects else ClassifierExport,
        argv,
        prog="scripts.export",
        description=__doc__.partition("\n")[0],
    )
    _check_sources(options, checkpoint)
    output = Path(options.output)
    if output.suffix == ".onnx":
        require_onnx()
    check_writable(output.parent)
    subject = (detector if detects else classifier)(options, checkpoint)
    difference = export(subject, output, options.opset)
    print(f"{output}: {output.stat().st_size / 1e6:.1f} MB, differs by {difference:.2g} at most")


def classifier(options: ClassifierExport, checkpoint: dict | None) -> Exportable:
    """The classifier of a checkpoint, or without one the published one.

    Raises:
        UsageError: Options that do not go together, or do not tell the model.
        UserError: The checkpoint does not hold what is asked for.
        CheckpointError: Weights that do not fit the model.
    """
    if checkpoint is None:
        if "model" not in options.model_fields_set:
            raise UsageError("--pretrained needs --model, whose published weights are exported")
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
    """The detector of a checkpoint, without the predictions of its earlier layers.

    Raises:
        UsageError: Options that do not go together, or do not tell the model.
        UserError: The checkpoint does not hold what is asked for.
        CheckpointError: Weights that do not fit the model.
    """
    weights = _weights(options, checkpoint)
    head = _class_head(weights)
    if head is None:
        raise UserError(
            f"--use-ema: the moving average of {options.checkpoint} is of no detector (a matrix "
            "class_embed.weight)"
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
    """Batches of images of different sizes `(B, 3, H, W)`, and their masks `(B, H, W)`."""
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


def _class_head(weights: dict[str, Tensor]) -> Tensor | None:
    """The matrix that every detector has and no classifier."""
    found = (w for name, w in weights.items() if name.endswith("class_embed.weight"))
    return next((w for w in found if w.ndim == 2), None)


def _check_sources(options: ExportOptions, checkpoint: dict | None) -> None:
    """The weights come from one place."""
    others = [name for name in ("pretrained", "finetune", "resume") if getattr(options, name, "")]
    if checkpoint is not None and others:
        raise UsageError(f"{others[0]} and checkpoint exclude each other: both give the weights")
    if checkpoint is None and (others != ["pretrained"] or options.checkpoint or options.use_ema):
        raise UsageError(
            "the flag --checkpoint gives the weights, or --pretrained with --model and without "
            "--use-ema"
        )


def _weights(options: ExportOptions, checkpoint: dict) -> dict[str, Tensor]:
    """Which of the checkpoint's weights to export."""
    weights = checkpoint.get("model_ema") if options.use_ema else checkpoint["model"]
    if weights is None:
        raise UserError(f"--use-ema: {options.checkpoint} holds no moving average (model_ema)")
    return weights


def _complete(
    options: ExportOptions, checkpoint: dict, groups: list[type[Config]], needed: str | None
) -> ExportOptions:
    """The options, and where none was given what the checkpoint says of its model.

    Args:
        options: From flags and `--config`.
        checkpoint: With or without `args`.
        groups: The options that shape the model.
        needed: The one without which the model is not known.
    """
    args = checkpoint.get("args") or {}
    shape = {name for group in groups for name in group.model_fields} - _OF_RUN
    values = {name: args[name] for name in shape if name in args}
    values |= {name: getattr(options, name) for name in options.model_fields_set}
    if needed and needed not in values:
        raise UsageError(f"{options.checkpoint} does not tell its {needed}: give --{needed}")
    try:
        return type(options).model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"]))
        raise UserError(f"args of {options.checkpoint}: {place}: {problem['msg']}") from error


if __name__ == "__main__":
    run(main, CheckpointError)
