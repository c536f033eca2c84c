r"""Export a trained model as an exported program (`.pt2`) or as ONNX (`.onnx`).

    python -m scripts.export --checkpoint outputs/checkpoint.pth --output model.onnx
    python -m scripts.export --checkpoint rpe-2.0-product-ctx-1-k.pth \
        --enc_rpe2d rpe-2.0-product-ctx-1-k --output detector.pt2
    python -m scripts.export --pretrained --output classifier.onnx \
        --model deit_tiny_patch16_224_ctx_product_50_shared_k

A classifier maps `images (B, 3, height, width)`, at the image size of the model, to `logits`. A
detector maps `images` of any size and `mask (B, height, width)`, True on padding, to `pred_logits`
and `pred_boxes`, and to `pred_masks` if it was trained with masks. The `args` of the checkpoint
describe the model; options that they lack are given as flags of the trainer or with `--config`. The
file is compared with the model before it is kept.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from detection.saved import class_head
from engine import UsageError, check_writable, parse_config, run
from irpe_core import load_checkpoint
from scripts.export.models import (
    ClassifierExport,
    DetectorExport,
    ExportOptions,
    classifier,
    detector,
)
from scripts.export.program import export, require_onnx

_DESCRIPTION = """
Export a trained model as .pt2 or .onnx. Besides the options of the group Export, only those of the
model have an effect. With the checkpoint of a detector, the options are those of detection.main.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Export the model that the flags name."""
    argv = sys.argv[1:] if argv is None else list(argv)
    # The kind of model in the checkpoint decides which trainer's flags are allowed.
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--checkpoint", nargs="?")
    source = finder.parse_known_args(argv)[0].checkpoint
    checkpoint = load_checkpoint(source) if source else None
    is_detector = checkpoint is not None and class_head(checkpoint["model"]) is not None
    options = parse_config(
        DetectorExport if is_detector else ClassifierExport,
        argv,
        prog="python -m scripts.export",
        description=_DESCRIPTION,
    )
    _check_sources(options, checkpoint)
    output = Path(options.output)
    if output.suffix == ".onnx":
        require_onnx()
    check_writable(output.parent)
    exportable = (detector if is_detector else classifier)(options, checkpoint)
    difference = export(exportable, output, options.opset)
    print(f"{output}: {output.stat().st_size / 1e6:.1f} MB, differs by {difference:.2g} at most")


def _check_sources(options: ExportOptions, checkpoint: dict | None) -> None:
    """Raise UsageError unless exactly one option gives the weights."""
    others = [name for name in ("pretrained", "finetune", "resume") if getattr(options, name, "")]
    if checkpoint is not None and others:
        raise UsageError(f"--{others[0]} and --checkpoint exclude each other: both set the weights")
    if checkpoint is None and (others != ["pretrained"] or options.checkpoint or options.use_ema):
        raise UsageError(
            "--checkpoint must give the weights, or --pretrained with --model and without --use-ema"
        )


if __name__ == "__main__":
    run(main)
