"""A trained classifier that predicts images: `classification.load`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data import create_transform
from torch import Tensor

from classification.build import autocast_dtype
from classification.config import ClassificationConfig
from classification.models import PUBLISHED
from classification.restore import restore, restore_published
from classification.saved import check_task
from datasets.image_files import ImageInput, open_image
from engine import autocast
from engine.config import make_config
from engine.distributed import select_device
from engine.exported import EXPORTED
from engine.prediction import class_names, open_for_task, select_weights
from irpe_core import load_checkpoint, set_implementation

__all__ = ["Classification", "Classifier", "load"]

_BATCH = 32


@dataclass(frozen=True)
class Classification:
    """The most probable classes of one image.

    Attributes:
        labels: Class numbers `(k,)`, most probable first.
        scores: Their probabilities `(k,)`.
        classes: Their names.
    """

    labels: Tensor
    scores: Tensor
    classes: list[str]


class Classifier:
    """A classifier with its transform and class names. `load` makes one.

    Args:
        model: Function from images `(B, 3, H, W)` to logits `(B, C)`.
        metadata: Description of the model, see `classification.saved.describe`.
        classes: Class names.
        device: Device of the model.
        dtype: Data type of automatic mixed precision.

    Attributes:
        model: The model, on its device and in evaluation mode.
        transform: Evaluation transform from a PIL RGB image to a tensor `(3, H, W)`.
        classes: Class names.
    """

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        metadata: Mapping[str, Any],
        classes: Sequence[str],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.model = model
        self.transform = create_transform(**metadata["transform"])
        self.classes = list(classes)
        self.device = device
        self.dtype = dtype

    def __call__(
        self, images: ImageInput | Sequence[ImageInput], *, topk: int = 5
    ) -> Classification | list[Classification]:
        """Classify images.

        Args:
            images: A path, URL, PIL image or uint8 array (H, W, 3), or a list of them. The EXIF
                orientation is honored.
            topk: Number of classes to return.

        Returns:
            The result of an image, or a list with the result of each image of a list.

        Raises:
            CorruptImageError: An image cannot be read.
            ValueError: An object is not an image, or `topk` is below 1.
        """
        if not isinstance(images, list | tuple):
            return self([images], topk=topk)[0]
        found: list[Classification] = []
        for start in range(0, len(images), _BATCH):
            batch = [self.transform(open_image(x)) for x in images[start : start + _BATCH]]
            found += self.predict(torch.stack(batch), topk)
        return found

    @torch.inference_mode()
    def predict(self, images: Tensor, topk: int = 5) -> list[Classification]:
        """Classify transformed images `(B, 3, H, W)`; see `__call__`."""
        if topk < 1:
            raise ValueError(f"topk must be at least 1, got {topk}")
        with autocast(self.device, self.dtype):
            logits = self.model(images.to(self.device))
        scores, labels = logits.float().softmax(-1).cpu().topk(min(topk, len(self.classes)))
        return [
            Classification(numbers, values, [self.classes[n] for n in numbers.tolist()])
            for numbers, values in zip(labels, scores, strict=True)
        ]


def load(
    source: str | Path,
    *,
    classes: str | Path | Sequence[str] | None = None,
    use_ema: bool | None = None,
    device: str = "auto",
    dtype: str = "auto",
    **options: Any,
) -> Classifier:
    """Load a classifier.

    Args:
        source: Path or URL of a checkpoint, a `.onnx` or `.pt2` file of `scripts.export`, or the
            name of a published model, whose weights are downloaded.
        classes: Class names, or a text file with one per line; None uses those of the source.
        use_ema: Use the EMA weights; None uses them if the checkpoint has them, as `--eval` does.
        device: `auto`, `cuda`, `cuda:N` or `cpu`.
        dtype: Data type of mixed precision, as of the trainer.
        **options: Options of the model that the checkpoint lacks, such as `model` and `rpe`.

    Raises:
        UsageError: An option is wrong, or the model is not described.
        UserError: The source is not a classifier, or its class names are unknown.
        CheckpointError: The checkpoint cannot be read, or its weights do not fit.
    """
    source = str(source)
    config = make_config(ClassificationConfig, {**options, "dtype": dtype})
    if source.endswith(EXPORTED):
        exported = open_for_task(
            source, "classification", device=device, dtype=dtype, options=options
        )
        metadata = exported.metadata
        names = class_names(classes, metadata["classes"], None, source)
        return Classifier(exported, metadata, names, torch.device("cpu"), torch.float32)
    target = select_device(device)
    if source in PUBLISHED and not Path(source).exists():
        named = make_config(ClassificationConfig, {**options, "model": source})
        model, metadata = restore_published(named)
    else:
        checkpoint = load_checkpoint(source)
        check_task(checkpoint, source)
        weights = select_weights(checkpoint, source, use_ema=use_ema)
        model, metadata = restore(config, checkpoint, weights, source)
    names = class_names(classes, metadata["classes"], model.num_classes, source)
    set_implementation(model.to(target), config.rpe_implementation, target)
    return Classifier(model, metadata, names, target, autocast_dtype(config, target))
