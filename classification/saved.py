"""The entries of a checkpoint that describe a classifier, and their use in later commands."""

from collections.abc import Mapping, Sequence
from typing import Any

from classification.config import ClassificationConfig, ModelConfig
from datasets.transforms import eval_settings
from engine import UserError, with_saved_options
from irpe_core import load_checkpoint

__all__ = ["check_task", "complete", "describe", "with_saved_model"]

_MODEL = set(ModelConfig.model_fields) - {"rpe_implementation"}
_DATA = {"data_set", "inat_category", "augment"}
_SPLIT = {"train_val_split", "split_seed"}


def describe(config: ClassificationConfig, classes: Sequence[str] | None) -> dict[str, Any]:
    """Return the entries of a checkpoint that describe task, classes and images.

    Args:
        config: The configuration of the model.
        classes: Class names; None if they are unknown.

    Returns:
        `task`, `classes`, `image_size` (height and width in pixels) and `transform` (arguments of
        `timm.data.create_transform`), all plain values.
    """
    return {
        "task": "classification",
        "classes": None if classes is None else list(classes),
        "image_size": list(config.image_size),
        "transform": eval_settings(config.image_size, config.augment),
    }


def complete(
    config: ClassificationConfig, checkpoint: Mapping[str, Any] | None
) -> ClassificationConfig:
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
    return with_saved_model(config, checkpoint, source, with_data=config.eval)


def with_saved_model(
    config: ClassificationConfig,
    checkpoint: Mapping[str, Any],
    source: str,
    *,
    with_data: bool,
    needed: str | None = None,
) -> ClassificationConfig:
    """Complete the options of the model from the `args` of a checkpoint.

    If the user names another model, the options in the checkpoint do not belong to it and none is
    taken.

    Args:
        config: The options.
        checkpoint: A checkpoint with or without `args`.
        source: Path or URL of the checkpoint, for error messages.
        with_data: Also take the options of the data set and its evaluation transform.
        needed: See `engine.with_saved_options`.
    """
    names = _MODEL | _DATA if with_data else _MODEL
    args = checkpoint.get("args") or {}
    if with_data and args.get("data_path") == config.data_path:
        # Another split of the same data would have training images in the validation part.
        names = names | _SPLIT
    saved = args.get("model")
    if "model" in config.model_fields_set and saved not in (None, config.model):
        names = names - _MODEL
    return with_saved_options(config, checkpoint, names, source=source, needed=needed)


def check_task(checkpoint: Mapping[str, Any], source: str) -> None:
    """Raise UserError for the checkpoint of a detector."""
    head = checkpoint["model"].get("class_embed.weight")
    is_detector = head is not None or "detr.class_embed.weight" in checkpoint["model"]
    if checkpoint.get("task", "classification") != "classification" or is_detector:
        raise UserError(
            f"{source} must be the checkpoint of a classifier, got that of a detector: "
            "use the commands of detection"
        )
