"""COCO, and other detection data sets in its format, with images from a folder or a zip.

A sample is (image, target). The target is prepared as in DETR: crowd annotations (`iscrowd`) are
dropped, boxes are clipped to the image, boxes without area are dropped. Images without objects are
kept. An image with EXIF rotation is turned upright if its annotated size is that of the upright
view; otherwise its pixels are used as stored.
"""

import contextlib
import io
import logging
import os
from collections.abc import Callable, Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as F

from datasets.coco_cache import open_annotations
from datasets.coco_json import label_map_of, read_json, select_images
from datasets.coco_layouts import find_coco
from datasets.coco_masks import decode_masks
from datasets.errors import CHECK_COMMAND, DataError
from datasets.image_sources import open_images
from datasets.images import decode_rgb
from datasets.saved_split import SplitOptions

if TYPE_CHECKING:
    from pycocotools.coco import COCO

__all__ = ["Target", "CocoTransform", "CocoImages", "build_coco"]

logger = logging.getLogger(__name__)

Target = dict[str, Tensor]
CocoTransform = Callable[[Image.Image, Target], tuple[Any, Target]]


class CocoImages(Dataset[tuple[Any, Target]]):
    """Images with their objects as (image, target).

    A category id is the number of a category in the annotation file; a label is the class number
    that the model predicts. For n objects in an image of h x w pixels, the target has:

    - `boxes`: (n, 4) float32, x0, y0, x1, y1 in pixels.
    - `labels`, `iscrowd`: (n,) int64.
    - `area`: (n,) float32, in square pixels.
    - `masks`: (n, h, w) bool, only with `with_masks`.
    - `image_id`: (1,) int64.
    - `orig_size`, `size`: (2,) int64, height and width before and after the transforms.

    `transforms` may change them; those of `coco_transforms` return normalized boxes cx, cy, w, h.

    Args:
        images: Folder or zip of the images.
        annotations: JSON file in COCO's format.
        transforms: Function applied to (RGB image, target). Its attribute `decode`, if it has one,
            decodes the files instead of `decode_rgb`.
        with_masks: Add the masks to the target.
        label_map: Category id of each label, for example `label_to_category` of the training split;
            by default the result of `label_map_of`.
        only: File names of the images of this split; None for all images of the file.

    Attributes:
        label_to_category: Category id of each label.
        num_classes: Number of labels.
        classes: Category name of each label; "N/A" for the category ids that COCO does not use.

    Raises:
        DataError: Images or annotations are missing or damaged, or a category has no label.
    """

    def __init__(
        self,
        images: str | os.PathLike[str],
        annotations: str | os.PathLike[str],
        *,
        transforms: CocoTransform | None = None,
        with_masks: bool = False,
        label_map: Mapping[int, int] | None = None,
        only: Collection[str] | None = None,
    ) -> None:
        self.annotation_file = Path(annotations)
        self._only = only
        self.transforms = transforms
        self._annotations = open_annotations(annotations, with_masks=with_masks, only=only)
        self._images = open_images(images, self._annotations.file_names)
        names = self._annotations.category_names
        self.label_to_category = dict(label_map_of(names) if label_map is None else label_map)
        categories = [self.label_to_category.get(label) for label in range(self.num_classes)]
        self.classes = [names.get(category, "N/A") for category in categories]
        self._labels = self._labels_of(self._annotations.categories)
        # In shared memory, so that a process and its workers mark the same images.
        self._other_size = torch.zeros(len(self), dtype=torch.bool).share_memory_()

    @property
    def num_classes(self) -> int:
        """Number of labels, including the category ids that COCO does not use."""
        return max(self.label_to_category) + 1

    @cached_property
    def coco(self) -> "COCO":
        """The annotation file as an object of pycocotools, read at the first access."""
        # Imported here because only the evaluation needs it.
        from pycocotools.coco import COCO

        coco = COCO()
        coco.dataset = read_json(self.annotation_file)
        if self._only is not None:
            coco.dataset = select_images(coco.dataset, self._only)
        for number, annotation in enumerate(coco.dataset["annotations"], 1):
            annotation.setdefault("id", number)
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
        return coco

    def __len__(self) -> int:
        return len(self._annotations.image_ids)

    def __getitem__(self, index: int) -> tuple[Any, Target]:
        """Return the transformed image and target.

        Raises:
            CorruptImageError: The image cannot be read or decoded.
        """
        name = f"{self._images.path}: {self._annotations.file_names[index]}"
        annotated = tuple(self._annotations.sizes[index].tolist())
        decode = getattr(self.transforms, "decode", decode_rgb)
        image = decode(self._images.read(index), name, annotated)
        height, width = F.get_size(image)
        if all(annotated) and annotated != (width, height) and not self._other_size[index]:
            self._report_size(index, name, (width, height))
        target = self._target(index, height, width)
        return self.transforms(image, target) if self.transforms else (image, target)

    def warn_if_other_size(self) -> None:
        """Log how many of the images read so far differ from their annotated size, if any do."""
        count = int(self._other_size.sum())
        if count:
            logger.warning(
                "%s: %d images have another size than annotated; %s",
                self.annotation_file,
                count,
                CHECK_COMMAND,
            )

    def _report_size(self, index: int, name: str, size: tuple[int, int]) -> None:
        """Mark an image whose width and height are not the annotated ones; log the first one."""
        first = not self._other_size.any()
        self._other_size[index] = True
        if first:
            width, height = self._annotations.sizes[index].tolist()
            logger.warning(
                "%s: the image has %d x %d pixels and its annotations are for %d x %d, so its "
                "boxes are in the wrong place; other such images are only counted",
                name,
                *size,
                width,
                height,
            )

    def __getstate__(self) -> dict[str, Any]:
        # Spawned workers only read samples; they do not need the object of pycocotools.
        return {key: value for key, value in self.__dict__.items() if key != "coco"}

    def _labels_of(self, categories: np.ndarray) -> np.ndarray:
        """Return the labels of category ids, both (M,) int64."""
        label_of = {category: label for label, category in self.label_to_category.items()}
        present, positions = np.unique(categories, return_inverse=True)
        unknown = [category for category in present.tolist() if category not in label_of]
        if unknown:
            name = self._annotations.category_names[unknown[0]]
            raise DataError(
                f"{self.annotation_file} has objects of category {unknown[0]} ({name}), which the "
                f"label map (of the training split, or the checkpoint) lacks; {CHECK_COMMAND}"
            )
        labels = np.array([label_of[category] for category in present.tolist()], dtype=np.int64)
        return labels[positions]

    def _target(self, index: int, height: int, width: int) -> Target:
        """Build the target of image `index` before the transforms."""
        annotations = self._annotations
        rows = slice(annotations.starts[index], annotations.starts[index + 1])
        boxes = annotations.boxes[rows].copy()
        boxes[:, 2:] += boxes[:, :2]
        boxes[:, 0::2] = boxes[:, 0::2].clip(0, width)
        boxes[:, 1::2] = boxes[:, 1::2].clip(0, height)
        kept = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
        labels = torch.from_numpy(self._labels[rows][kept])
        size = torch.tensor([height, width])
        target = {
            "boxes": torch.from_numpy(boxes[kept]),
            "labels": labels,
            "image_id": torch.tensor([int(annotations.image_ids[index])]),
            "area": torch.from_numpy(annotations.areas[rows][kept]),
            "iscrowd": torch.zeros_like(labels),
            "orig_size": size,
            "size": size.clone(),
        }
        if annotations.segmentations is not None:
            kept_rows = int(annotations.starts[index]) + kept.nonzero()[0]
            segmentations = [annotations.segmentations[row] for row in kept_rows.tolist()]
            try:
                target["masks"] = decode_masks(segmentations, height, width)
            except DataError as error:
                raise DataError(
                    f"{self.annotation_file}: {annotations.file_names[index]}: {error}"
                ) from error
        return target


def build_coco(
    split: Literal["train", "val"],
    coco_path: str | os.PathLike[str] | None = None,
    *,
    images: str | os.PathLike[str] | None = None,
    annotations: str | os.PathLike[str] | None = None,
    transforms: CocoTransform | None = None,
    with_masks: bool = False,
    label_map: Mapping[int, int] | None = None,
    train_val_split: SplitOptions | None = None,
) -> CocoImages:
    """Open one split of COCO, or of another data set in its format.

    Args:
        split: `train` or `val`.
        coco_path: Folder with `annotations/instances_<split>2017.json`, and the images in the
            folder `<split>2017` or in `<split>2017.zip`. If both exist, the folder is used. Other
            layouts are described in `coco_layouts`.
        images: Folder or zip of the images, instead of those in `coco_path`.
        annotations: JSON file in COCO's format, instead of that in `coco_path`.
        transforms: Function applied to (RGB image, target).
        with_masks: Add the masks to the target.
        label_map: Category id of each label, see `CocoImages`.
        train_val_split: Use a part of the training images for validation, see `saved_split`. If
            `images` and `annotations` are given, both splits must get the same.

    Raises:
        DataError: Images or annotations are missing or damaged, or no path to them is given.
        ValueError: The split is unknown.
    """
    files = find_coco(
        split,
        coco_path,
        images=images,
        annotations=annotations,
        train_val_split=train_val_split,
    )
    return CocoImages(
        files.images,
        files.annotations,
        transforms=transforms,
        with_masks=with_masks,
        label_map=label_map,
        only=files.only,
    )
