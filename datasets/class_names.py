"""Class names of ImageNet and COCO, from the metadata of torchvision's published weights."""

import re
from collections.abc import Sequence

__all__ = ["coco_names", "imagenet_names", "is_imagenet"]

_WORDNET_ID = re.compile(r"n\d{8}")


def imagenet_names() -> list[str]:
    """Return the names of ImageNet's 1,000 classes, in the order of their WordNet ids."""
    from torchvision.models import ResNet50_Weights

    return list(ResNet50_Weights.DEFAULT.meta["categories"])


def is_imagenet(classes: Sequence[str]) -> bool:
    """Return whether class names are the folders of ImageNet: 1,000 WordNet ids in order."""
    return (
        len(classes) == 1000
        and all(map(_WORDNET_ID.fullmatch, classes))
        and list(classes) == sorted(classes)
    )


def coco_names() -> list[str]:
    """Return the names of COCO's categories by category id, 0 to 90; unused ids have "N/A"."""
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

    names = FasterRCNN_ResNet50_FPN_Weights.DEFAULT.meta["categories"]
    return ["N/A", *names[1:]]
