"""The result of a detector for one image."""

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Detections"]


@dataclass(frozen=True)
class Detections:
    """The n objects found in one image, most certain first.

    Attributes:
        boxes: Corners (x1, y1, x2, y2) in pixels of the upright image, `(n, 4)`.
        scores: Probabilities of the classes, `(n,)`.
        labels: Class numbers, `(n,)`.
        classes: Class names.
        categories: Category ids of the data set that the model was trained on.
        masks: Masks `(n, H, W)` bool at the size of the image; None for a model without masks.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    classes: list[str]
    categories: list[int]
    masks: Tensor | None = None
