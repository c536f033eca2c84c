"""The entries of a checkpoint that describe a detector, and their use in later commands."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from datasets import build_coco_transforms
from detection.config import BackboneConfig, DetectionConfig, LossConfig, TransformerConfig
from engine import UserError, with_saved_options
from irpe_core import load_checkpoint

__all__ = ["check_task", "class_head", "complete", "describe", "with_saved_model"]

_MODEL = {*BackboneConfig.model_fields, *TransformerConfig.model_fields, "image_size"}
# The number of classes is that of the data, unless the user gives another.
_MODEL -= {"rpe_implementation", "num_classes"}
_EVALUATION = {*LossConfig.model_fields, "num_classes", "eval_padding"}
_DATA = ("coco_path", "train_images", "train_annotations", "val_images", "val_annotations")
_SPLIT = {"train_val_split", "split_seed"}


def describe(
    config: DetectionConfig, classes: Sequence[str] | None, label_to_category: Mapping[int, int]
) -> dict[str, Any]:
    """Return the entries of a checkpoint that describe task, classes and images.

    Args:
        config: The configuration of the model.
        classes: Class name of each label; None if they are unknown.
        label_to_category: Category id of each label.

    Returns:
        `task`, `classes`, `label_to_category`, `image_size` (short side in pixels) and `transform`
        (see `EvalTransform.settings`), all plain values.
    """
    settings = build_coco_transforms("val", image_size=config.image_size).settings()
    return {
        "task": "detection",
        "classes": None if classes is None else list(classes),
        "label_to_category": dict(label_to_category),
        "image_size": settings["shortest_edge"],
        "transform": settings,
    }


def complete(config: DetectionConfig, checkpoint: Mapping[str, Any] | None) -> DetectionConfig:
    """Complete the options of `--eval` and `--finetune` from their checkpoint.

    Args:
        config: The options.
        checkpoint: Checkpoint to resume or to evaluate; None for none.
    """
    if not config.finetune and (checkpoint is None or not config.eval):
        return config
    source = config.finetune if checkpoint is None else config.resume or "the checkpoint"
    if checkpoint is None:
        checkpoint = load_checkpoint(config.finetune)
    check_task(checkpoint, source)
    names = _MODEL | _EVALUATION if config.eval else _MODEL
    args = checkpoint.get("args") or {}
    if config.eval and all(args.get(name) == getattr(config, name) for name in _DATA):
        # Another split of the same data would have training images in the validation part.
        names = names | _SPLIT
    return with_saved_options(config, checkpoint, names, source=source)


def with_saved_model(
    config: DetectionConfig,
    checkpoint: Mapping[str, Any],
    source: str,
    weights: Mapping[str, Tensor],
) -> DetectionConfig:
    """Complete the options of a model from the `args` and the weights of its checkpoint.

    Args:
        config: The options.
        checkpoint: A checkpoint with or without `args`.
        source: Path or URL of the checkpoint, for error messages.
        weights: The weights of the model or of its EMA.

    Raises:
        UsageError: The weights have iRPE, but neither the options nor `args` name its spec.
        UserError: A value in `args` is not allowed.
    """
    has_tables = any("lookup_table" in name for name in weights)
    needed = "enc_rpe2d" if has_tables else None
    config = with_saved_options(config, checkpoint, _MODEL, source=source, needed=needed)
    num_classes = len(class_head(weights)) - 1
    return config.model_copy(update={"num_classes": num_classes, "aux_loss": False})


def class_head(weights: Mapping[str, Tensor]) -> Tensor | None:
    """Return the weight matrix of a detector's class head, None for other models."""
    found = (w for name, w in weights.items() if name.endswith("class_embed.weight"))
    return next((w for w in found if w.ndim == 2), None)


def check_task(checkpoint: Mapping[str, Any], source: str) -> None:
    """Raise UserError for the checkpoint of a classifier."""
    is_classifier = "head.weight" in checkpoint["model"]
    if checkpoint.get("task", "detection") != "detection" or is_classifier:
        raise UserError(
            f"{source} must be the checkpoint of a detector, got that of a classifier: "
            "use the commands of classification"
        )
