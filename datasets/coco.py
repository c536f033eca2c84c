"""COCO, and any data set of its format: images from a folder or a zip, boxes, labels, masks.

A sample is (image, target), the target as DETR prepares it: crowds dropped, boxes clipped to the
image, boxes without area dropped. Images without objects are kept.
"""

import contextlib
import io
import logging
import os
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from datasets.coco_annotations import label_map_of, read_annotations, read_json
from datasets.coco_masks import decode_masks
from datasets.errors import DataError
from datasets.image_sources import find_split, open_images
from datasets.images import decode_rgb

if TYPE_CHECKING:
    from pycocotools.coco import COCO

logger = logging.getLogger(__name__)

Target = dict[str, Tensor]
CocoTransform = Callable[[Image.Image, Target], tuple[Any, Target]]


class CocoImages(Dataset[tuple[Any, Target]]):
    """Images with objects.

    A target holds `boxes (n, 4)` float32 as x0, y0, x1, y1 in pixels, `labels (n,)`,
    `masks (n, h, w)` bool where asked for, `image_id (1,)`, `area (n,)` float32, `iscrowd (n,)`,
    `orig_size (2,)` and `size (2,)` as (h, w); integers are int64. `transforms` may change all of
    it: those of `coco_transforms` make the boxes normalized cx, cy, w, h.

    Args:
        images: Folder or zip.
        annotations: JSON file in COCO's format.
        transforms: Applied to (RGB image, target).
        with_masks: Draw the masks too.
        label_map: Category id of each label, such as the training split's `label_to_category`; by
            default that of `label_map_of`.

    Attributes:
        label_to_category: Category id of each label.
        num_classes: Number of labels.
        classes: Names of the labels; "N/A" for numbers that COCO leaves out.

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
    ) -> None:
        self.annotation_file = Path(annotations)
        self.transforms = transforms
        self._table = read_annotations(annotations, with_masks=with_masks)
        self._images = open_images(images, self._table.file_names)
        names = self._table.category_names
        self.label_to_category = dict(label_map_of(names) if label_map is None else label_map)
        categories = [self.label_to_category.get(label) for label in range(self.num_classes)]
        self.classes = [names.get(category, "N/A") for category in categories]
        self._labels = self._number(self._table.categories)

    @property
    def num_classes(self) -> int:
        """Number of labels; those of COCO include the numbers left out."""
        return max(self.label_to_category) + 1

    @cached_property
    def coco(self) -> "COCO":
        """The annotation file in pycocotools' own form, read at the first use."""
        # Imported here: training alone does not need it.
        from pycocotools.coco import COCO

        coco = COCO()
        coco.dataset = read_json(self.annotation_file)
        for number, annotation in enumerate(coco.dataset["annotations"], 1):
            annotation.setdefault("id", number)
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
        return coco

    def __len__(self) -> int:
        return len(self._table.image_ids)

    def __getitem__(self, index: int) -> tuple[Any, Target]:
        """Returns the image and its target, transformed.

        Raises:
            CorruptImageError: The image cannot be read or decoded.
        """
        name = f"{self._images.path}: {self._table.file_names[index]}"
        image = decode_rgb(self._images.read(index), name)
        target = self._target(index, image.height, image.width)
        return self.transforms(image, target) if self.transforms else (image, target)

    def __getstate__(self) -> dict[str, Any]:
        # Workers draw samples; only the evaluation needs the file in pycocotools' form.
        return {key: value for key, value in self.__dict__.items() if key != "coco"}

    def _number(self, categories: np.ndarray) -> np.ndarray:
        """Category ids to labels, (M,) int64."""
        label_of = {category: label for label, category in self.label_to_category.items()}
        unknown = sorted(set(categories.tolist()) - set(label_of))
        if unknown:
            name = self._table.category_names[unknown[0]]
            raise DataError(
                f"{self.annotation_file} has objects of category {unknown[0]} ({name}), which the "
                "label map (that of the training split) lacks"
            )
        return np.array([label_of[category] for category in categories.tolist()], dtype=np.int64)

    def _target(self, index: int, height: int, width: int) -> Target:
        table = self._table
        rows = slice(table.starts[index], table.starts[index + 1])
        boxes = table.boxes[rows].copy()
        boxes[:, 2:] += boxes[:, :2]
        boxes[:, 0::2] = boxes[:, 0::2].clip(0, width)
        boxes[:, 1::2] = boxes[:, 1::2].clip(0, height)
        kept = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
        labels = torch.from_numpy(self._labels[rows][kept])
        size = torch.tensor([height, width])
        target = {
            "boxes": torch.from_numpy(boxes[kept]),
            "labels": labels,
            "image_id": torch.tensor([int(table.image_ids[index])]),
            "area": torch.from_numpy(table.areas[rows][kept]),
            "iscrowd": torch.zeros_like(labels),
            "orig_size": size,
            "size": size.clone(),
        }
        if table.segmentations is not None:
            first = int(table.starts[index])
            shapes = [table.segmentations[first + i] for i in kept.nonzero()[0].tolist()]
            try:
                target["masks"] = decode_masks(shapes, height, width)
            except DataError as error:
                raise DataError(
                    f"{self.annotation_file}: {table.file_names[index]}: {error}"
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
) -> CocoImages:
    """Opens one split of COCO as it lies on the disk, or any data set of its format.

    Args:
        split: `train` or `val`.
        coco_path: Folder with `annotations/instances_<split>2017.json`, and the images as the
            folder `<split>2017` or as `<split>2017.zip`. Where both are there, the folder is read.
        images: Folder or zip of the images, in place of that.
        annotations: JSON file, in place of that.
        transforms: Applied to (RGB image, target).
        with_masks: Draw the masks too.
        label_map: Category id of each label, as `CocoImages` has it.

    Raises:
        DataError: Images or annotations are missing or damaged, or not said where.
        ValueError: An unknown split.
    """
    if split not in ("train", "val"):
        raise ValueError(f"split must be train or val, not {split!r}")
    if coco_path is None and (images is None or annotations is None):
        raise DataError(f"no data to {split}: expected coco_path, or images and annotations")
    if coco_path is not None:
        root = Path(coco_path)
        if not root.is_dir():
            raise DataError(f"there is no folder {root}: expected COCO there")
        annotations = annotations or root / "annotations" / f"instances_{split}2017.json"
        if images is None:
            images, note = find_split(root, f"{split}2017")
            logger.info(note or f"{split}: images from {images}")
    return CocoImages(
        images,
        annotations,
        transforms=transforms,
        with_masks=with_masks,
        label_map=label_map,
    )
