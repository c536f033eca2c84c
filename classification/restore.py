"""Build the classifier of a checkpoint, with the metadata that describe its classes and images."""

import logging
from collections.abc import Mapping
from typing import Any

import timm
from torch import Tensor, nn

from classification.build import create_model
from classification.config import ClassificationConfig
from classification.saved import describe, with_saved_model
from datasets.class_names import imagenet_names, is_imagenet
from engine import UserError

__all__ = ["restore", "restore_published"]

logger = logging.getLogger(__name__)


def restore(
    config: ClassificationConfig,
    checkpoint: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    source: str,
) -> tuple[nn.Module, dict[str, Any]]:
    """Build the classifier of a checkpoint.

    Args:
        config: Options of the model, which override those of the checkpoint.
        checkpoint: The checkpoint.
        weights: Its weights, or those of its EMA.
        source: Path or URL of the checkpoint, for error messages.

    Returns:
        The model in evaluation mode, and its metadata (see `classification.saved.describe`). The
        classes are None if they are unknown.

    Raises:
        UsageError: The options do not describe the model.
        UserError: The weights are not those of a classifier, or a value in `args` is not allowed.
        CheckpointError: The weights do not fit the model.
    """
    head = weights.get("head.weight")
    if head is None or head.ndim != 2:
        raise UserError(f"{source} must hold a classifier (a matrix head.weight)")
    config = with_saved_model(config, checkpoint, source, with_data=True, needed="model")
    model = create_model(config, len(head), {"model": weights})
    return model.eval(), describe(config, _class_names(checkpoint.get("classes"), len(head)))


def restore_published(config: ClassificationConfig) -> tuple[nn.Module, dict[str, Any]]:
    """Build the published model that the options name; see `restore`.

    Raises:
        UsageError: The options do not fit the model.
        CheckpointError: The published weights cannot be loaded.
    """
    num_classes = timm.models.get_pretrained_cfg_value(config.model, "num_classes")
    model = create_model(config.model_copy(update={"pretrained": True}), num_classes)
    return model.eval(), describe(config, _class_names(None, num_classes))


def _class_names(classes: list[str] | None, count: int) -> list[str] | None:
    """Return the names of classes in a checkpoint; readable names for those of ImageNet."""
    if classes is None and count == 1000:
        logger.info("the checkpoint has no class names: its 1000 classes are those of ImageNet")
        return imagenet_names()
    return imagenet_names() if classes is not None and is_imagenet(classes) else classes
