"""A trained detector that predicts images: `detection.load`."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datasets.coco_transforms import EvalTransform
from datasets.image_files import ImageInput, open_image
from detection.build import autocast_dtype
from detection.config import DetectionConfig
from detection.detections import Detections
from detection.postprocess import PostProcess, PostProcessSegm
from detection.restore import restore
from detection.saved import check_task
from engine import autocast
from engine.config import make_config
from engine.distributed import select_device
from engine.exported import EXPORTED
from engine.prediction import class_names, open_for_task, select_weights
from engine.tensors import map_tensors
from irpe_core import load_checkpoint, set_implementation

__all__ = ["Detector", "load"]

_BATCH = 8


class Detector:
    """A detector with its transform and class names. `load` makes one.

    Args:
        model: Function from images `(B, 3, H, W)` and their padding mask `(B, H, W)` to the outputs
            of `DETR`.
        metadata: Description of the model, see `detection.saved.describe`.
        classes: Class names.
        device: Device of the model.
        dtype: Data type of automatic mixed precision.

    Attributes:
        model: The model, on its device and in evaluation mode.
        transform: Evaluation transform from a PIL RGB image to a tensor `(3, h, w)`.
        classes: Class name of each label.
    """

    def __init__(
        self,
        model: Callable[[Tensor, Tensor], dict[str, Tensor]],
        metadata: Mapping[str, Any],
        classes: Sequence[str],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.model = model
        sizes = metadata["transform"]
        self.transform = EvalTransform(
            sizes["shortest_edge"], sizes["longest_edge"]
        ).transform_image
        self.classes = list(classes)
        # JSON has text as keys.
        self._categories = {int(k): v for k, v in metadata["label_to_category"].items()}
        self.device = device
        self.dtype = dtype

    def __call__(
        self, images: ImageInput | Sequence[ImageInput], *, threshold: float = 0.5
    ) -> Detections | list[Detections]:
        """Detect objects.

        Args:
            images: A path, URL, PIL image or uint8 array (H, W, 3), or a list of them. The EXIF
                orientation is honored.
            threshold: Smallest score of an object, in [0, 1].

        Returns:
            The objects in an image, or a list with those of each image of a list.

        Raises:
            CorruptImageError: An image cannot be read.
            ValueError: An object is not an image, or the threshold is out of range.
        """
        if not isinstance(images, list | tuple):
            return self([images], threshold=threshold)[0]
        found: list[Detections] = []
        for start in range(0, len(images), _BATCH):
            opened = [open_image(image) for image in images[start : start + _BATCH]]
            sizes = [(image.height, image.width) for image in opened]
            found += self.predict([self.transform(image) for image in opened], sizes, threshold)
        return found

    @torch.inference_mode()
    def predict(
        self, images: Sequence[Tensor], sizes: Sequence[tuple[int, int]], threshold: float = 0.5
    ) -> list[Detections]:
        """Detect objects in transformed images, without padding as in the evaluation.

        Args:
            images: Transformed images `(3, h, w)` of any size.
            sizes: Height and width of the original images.
            threshold: See `__call__`.

        Returns:
            The objects in each image.
        """
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold must be in [0, 1], got {threshold}")
        groups: dict[torch.Size, list[int]] = {}
        for number, image in enumerate(images):
            groups.setdefault(image.shape, []).append(number)
        found: dict[int, Detections] = {}
        for members in groups.values():
            batch = torch.stack([images[i] for i in members]).to(self.device)
            mask = torch.zeros_like(batch[:, 0], dtype=torch.bool)
            with autocast(self.device, self.dtype):
                outputs = self.model(batch, mask)
            outputs = map_tensors(lambda x: x.float().cpu(), outputs)
            originals = torch.tensor([sizes[i] for i in members])
            for row, result in enumerate(PostProcess()(outputs, originals)):
                masks = outputs["pred_masks"][row] if "pred_masks" in outputs else None
                inner = tuple(batch.shape[-2:])
                found[members[row]] = self._select(
                    result, masks, inner, sizes[members[row]], threshold
                )
        return [found[number] for number in range(len(images))]

    def _select(
        self,
        result: dict[str, Tensor],
        mask_logits: Tensor | None,
        inner: tuple[int, int],
        size: tuple[int, int],
        threshold: float,
    ) -> Detections:
        """Return the objects of an image above the threshold, with masks at its size.

        Args:
            result: Scores, labels and boxes of all queries.
            mask_logits: Mask logits of all queries `(Q, h, w)`; None without masks.
            inner: Height and width of the transformed image.
            size: Height and width of the original image.
            threshold: Smallest score.
        """
        # As in the evaluation, labels without a category and boxes of nan are left out.
        categories = torch.tensor(list(self._categories))
        valid = torch.isin(result["labels"], categories) & result["boxes"].isfinite().all(1)
        order = result["scores"].argsort(descending=True, stable=True)
        kept = order[(valid & (result["scores"] >= threshold))[order]]
        result = {name: values[kept] for name, values in result.items()}
        masks = None
        if mask_logits is not None:
            # Only the masks of these objects are resized: a mask has as many bytes as pixels.
            masks = torch.zeros(len(kept), *size, dtype=torch.bool)
            if len(kept):
                outputs = {"pred_masks": mask_logits[kept][None]}
                originals, inners = torch.tensor([size]), torch.tensor([inner])
                ((resized),) = PostProcessSegm()([result], outputs, originals, inners)
                masks = resized["masks"]
        labels = result["labels"].tolist()
        return Detections(
            boxes=result["boxes"],
            scores=result["scores"],
            labels=result["labels"],
            classes=[self.classes[label] for label in labels],
            categories=[self._categories[label] for label in labels],
            masks=masks,
        )


def load(
    source: str | Path,
    *,
    classes: str | Path | Sequence[str] | None = None,
    use_ema: bool | None = None,
    device: str = "auto",
    dtype: str = "auto",
    **options: Any,
) -> Detector:
    """Load a detector.

    Args:
        source: Path or URL of a checkpoint, or a `.onnx` or `.pt2` file of `scripts.export`.
        classes: Class names, or a text file with one per line; None uses those of the source.
        use_ema: Use the EMA weights; None uses them if the checkpoint has them, as `--eval` does.
        device: `auto`, `cuda`, `cuda:N` or `cpu`.
        dtype: Data type of mixed precision, as of the trainer.
        **options: Options of the model that the checkpoint lacks, such as `enc_rpe2d`.

    Raises:
        UsageError: An option is wrong, or the model is not described.
        UserError: The source is not a detector, or its class names are unknown.
        CheckpointError: The checkpoint cannot be read, or its weights do not fit.
    """
    source = str(source)
    config = make_config(DetectionConfig, {**options, "dtype": dtype})
    if source.endswith(EXPORTED):
        exported = open_for_task(source, "detection", device=device, dtype=dtype, options=options)
        metadata = exported.metadata
        names = class_names(classes, metadata["classes"], None, source)
        return Detector(exported, metadata, names, torch.device("cpu"), torch.float32)
    target = select_device(device)
    checkpoint = load_checkpoint(source)
    check_task(checkpoint, source)
    weights = select_weights(checkpoint, source, use_ema=use_ema)
    model, metadata = restore(config, checkpoint, weights, source)
    names = class_names(classes, metadata["classes"], len(metadata["label_to_category"]), source)
    set_implementation(model.to(target), config.rpe_implementation, target)
    return Detector(model, metadata, names, target, autocast_dtype(config))
