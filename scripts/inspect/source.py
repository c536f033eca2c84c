"""The model of a checkpoint with its evaluation transform, for classifiers and detectors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from classification.config import ClassificationConfig
from classification.models import PUBLISHED
from classification.predictor import Classifier
from classification.restore import restore as restore_classifier
from classification.restore import restore_published
from detection.config import DetectionConfig
from detection.predictor import Detector
from detection.restore import restore as restore_detector
from detection.saved import class_head
from engine import UsageError
from engine.config import make_config
from engine.exported import EXPORTED
from engine.prediction import select_weights
from irpe_core import load_checkpoint

__all__ = ["Source", "is_published", "open_source"]


class Source(NamedTuple):
    """A trained model and what is needed to show an image to it.

    Attributes:
        model: The model, on the CPU and in evaluation mode.
        transform: Function from a PIL RGB image to a normalized tensor `(3, height, width)`.
        metadata: Entries `image_size` and `transform` of the checkpoint.
    """

    model: nn.Module
    transform: Callable[[Image.Image], Tensor]
    metadata: dict[str, Any]

    @property
    def reads_class_token(self) -> bool:
        """True for a classifier whose head reads nothing but the class token."""
        return getattr(self.model, "global_pool", None) == "token"

    def blank(self) -> Image.Image:
        """Return a gray image of the size that the model is made for."""
        size = self.metadata["image_size"]
        height, width = (size, size) if isinstance(size, int) else size
        return Image.new("RGB", (width, height), "gray")


def is_published(checkpoint: str) -> bool:
    """Return whether a word names a published classifier and not a file."""
    return checkpoint in PUBLISHED and not Path(checkpoint).exists()


def open_source(
    checkpoint: str, *, model: str = "", enc_rpe2d: str = "", use_ema: bool | None = None
) -> Source:
    """Build the model of a checkpoint.

    Args:
        checkpoint: Path or URL of a checkpoint, or the name of a published classifier.
        model: Name of the model, for the checkpoint of a classifier without `args`.
        enc_rpe2d: Spec of the iRPE, for the checkpoint of a detector without `args`.
        use_ema: Use the EMA weights; None uses them if the checkpoint has them.

    Raises:
        UsageError: An option does not fit the checkpoint, or the model is not described.
        UserError: The checkpoint is neither that of a classifier nor that of a detector.
        CheckpointError: The checkpoint cannot be read, or its weights do not fit.
    """
    if checkpoint.endswith(EXPORTED):
        raise UsageError(f"checkpoint must be a checkpoint, got the exported file {checkpoint}")
    settings = [], torch.device("cpu"), torch.float32
    if is_published(checkpoint):
        config = make_config(ClassificationConfig, {"model": checkpoint})
        network, metadata = restore_published(config)
        return Source(network, Classifier(network, metadata, *settings).transform, metadata)
    content = load_checkpoint(checkpoint)
    weights = select_weights(content, checkpoint, use_ema=use_ema)
    is_detector = class_head(weights) is not None
    if model if is_detector else enc_rpe2d:
        flag, kind = ("--model", "detector") if is_detector else ("--enc-rpe2d", "classifier")
        raise UsageError(f"{flag} must not be given for a {kind}, which {checkpoint} is")
    options = {name: v for name, v in (("model", model), ("enc_rpe2d", enc_rpe2d)) if v}
    configs, restore, predictor = (
        (DetectionConfig, restore_detector, Detector)
        if is_detector
        else (ClassificationConfig, restore_classifier, Classifier)
    )
    network, metadata = restore(make_config(configs, options), content, weights, checkpoint)
    return Source(network, predictor(network, metadata, *settings).transform, metadata)
