"""Build the detector of a checkpoint, with the metadata that describe its classes and images."""

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from datasets.class_names import coco_names
from detection.build import COCO_CLASSES, build_network
from detection.config import DetectionConfig
from detection.saved import class_head, describe, with_saved_model
from engine import UsageError, UserError
from irpe_core import load_weights

__all__ = ["restore"]

logger = logging.getLogger(__name__)


def restore(
    config: DetectionConfig,
    checkpoint: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    source: str,
) -> tuple[nn.Module, dict[str, Any]]:
    """Build the detector of a checkpoint, without the predictions of earlier decoder layers.

    Args:
        config: Options of the model, which override those of the checkpoint.
        checkpoint: The checkpoint.
        weights: Its weights, or those of its EMA.
        source: Path or URL of the checkpoint, for error messages.

    Returns:
        The model in evaluation mode, and its metadata (see `detection.saved.describe`). The classes
        are None if they are unknown.

    Raises:
        UsageError: The options do not describe the model.
        UserError: The weights are not those of a detector, or a value in `args` is not allowed.
        CheckpointError: The weights do not fit the model.
    """
    if class_head(weights) is None:
        raise UserError(f"{source} must hold a detector (a matrix class_embed.weight)")
    config = with_saved_model(config, checkpoint, source, weights)
    try:
        model = build_network(config, load=False)
    except ValueError as error:
        raise UsageError(str(error)) from error
    load_weights(model, dict(weights))
    categories = checkpoint.get("label_to_category")
    categories = {n: n for n in range(config.num_classes)} if categories is None else categories
    classes = checkpoint.get("classes")
    if classes is None and categories == {n: n for n in range(COCO_CLASSES)}:
        logger.info("the checkpoint has no class names: its 91 classes are those of COCO")
        classes = coco_names()
    return model.eval(), describe(config, classes, categories)
