"""The predictions of `detection.predict`, which imports this after its flags."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, count
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_masks
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from datasets.coco_annotations import read_json
from datasets.image_files import ImageFile, ImageFiles, find_images
from detection.config import BackboneConfig, TransformerConfig
from detection.detections import Detections
from detection.predictor import Detector, load
from engine import UsageError, UserError, check_writable, replacing, require
from engine.prediction import (
    check_outputs,
    predict_files,
    printable,
    require_all,
    start_prediction,
    write_output,
)

if TYPE_CHECKING:
    from detection.predict import DetectorPredict

__all__ = ["predict"]

_JPEG = (".jpg", ".jpeg")


def predict(config: "DetectorPredict") -> None:
    """Detect objects in the images that the options name."""
    start_prediction()
    if config.output_dir:
        require("matplotlib", "--output-dir")
    files = find_images(config.images)
    ids = _image_ids(files, config.annotations)
    pictures = _picture_paths(files, Path(config.output_dir)) if config.output_dir else None
    boxes_file, masks_file = Path(config.json_), Path(f"{config.json_[:-5]}_segm.json")
    outputs = [boxes_file, masks_file] if config.json_ else []
    check_outputs([*outputs, *(pictures or [])], force=config.force)
    detector = _load(config)
    results: dict[Path, list[dict[str, Any]]] = {boxes_file: []}

    def predict_batch(batch: list[tuple[int, _Sample]]) -> None:
        tensors, sizes = [s.image for _, s in batch], [s.size for _, s in batch]
        detections = detector.predict(tensors, sizes, config.threshold)
        for (index, sample), found in zip(batch, detections, strict=True):
            if pictures is not None:
                _save_picture(sample.pixels, found, pictures[index])
            if config.json_:
                place = {"image_id": ids[index], "file_name": files[index].short_name}
                results[boxes_file].extend(place | entry for entry in _box_entries(found))
                if found.masks is not None:
                    masks = results.setdefault(masks_file, [])
                    masks.extend(place | entry for entry in _mask_entries(found))
            if pictures is None and not config.json_:
                print(_line(files[index].name, found))

    # The workers need only the transform, not the model.
    with_pixels = pictures is not None
    samples = partial(_Sample.of, transform=detector.transform, with_pixels=with_pixels)
    bad = predict_files(ImageFiles([file.name for file in files], samples), predict_batch, config)
    if config.json_:
        for path, entries in results.items():
            write_output(path, json.dumps(entries))
    require_all(bad, len(files))


def _box_entries(found: Detections) -> Iterator[dict[str, Any]]:
    """Yield the boxes of an image in COCO's format of results, without the image."""
    corners = found.boxes.double()
    boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1).tolist()
    for category, score, box in zip(found.categories, found.scores.tolist(), boxes, strict=True):
        yield {"category_id": category, "score": score, "bbox": box}


def _mask_entries(found: Detections) -> Iterator[dict[str, Any]]:
    """Yield the masks of an image in COCO's format of results, without the image.

    They have no boxes, or pycocotools would take the area of the box for that of the mask.
    """
    rows = zip(found.categories, found.scores.tolist(), found.masks.numpy(), strict=True)
    for category, score, mask in rows:
        rle = coco_masks.encode(np.asfortranarray(mask.astype(np.uint8)))
        segmentation = {"size": rle["size"], "counts": rle["counts"].decode()}
        yield {"category_id": category, "score": score, "segmentation": segmentation}


@dataclass(frozen=True)
class _Sample:
    """One image: transformed `(3, h, w)`, its height and width, and its pixels to draw into."""

    image: Tensor
    size: tuple[int, int]
    pixels: Tensor | None

    @staticmethod
    def of(
        image: Image.Image, *, transform: Callable[[Image.Image], Tensor], with_pixels: bool
    ) -> "_Sample":
        """Transform an image."""
        pixels = F.pil_to_tensor(image) if with_pixels else None
        return _Sample(transform(image), (image.height, image.width), pixels)


def _load(config: "DetectorPredict") -> Detector:
    """Load the detector that the options name."""
    own = {*BackboneConfig.model_fields, *TransformerConfig.model_fields, "image_size"}
    given = config.model_fields_set & own
    return load(
        config.checkpoint,
        classes=config.classes,
        use_ema=config.use_ema,
        device=config.device,
        dtype=config.dtype,
        **{name: getattr(config, name) for name in given},
    )


def _image_ids(files: Sequence[ImageFile], annotations: str) -> list[int]:
    """Return the image ids of files for the JSON output.

    Raises:
        DataError: The annotations cannot be read.
        UserError: The annotations lack an image.
    """
    names = [file.short_name for file in files]
    if not annotations:
        stems = [PurePosixPath(name).stem for name in names]
        numbers = [int(stem) if stem.isascii() and stem.isdigit() else None for stem in stems]
        is_unique = None not in numbers and len(set(numbers)) == len(numbers)
        return numbers if is_unique else list(range(1, len(files) + 1))
    listed = read_json(Path(annotations)).get("images") or []
    by_name = {str(image.get("file_name")): image.get("id") for image in listed}
    ids = [by_name.get(name, by_name.get(PurePosixPath(name).name)) for name in names]
    if None in ids:
        raise UserError(f"{annotations} must list the image {names[ids.index(None)]}")
    return ids


def _picture_paths(files: Sequence[ImageFile], folder: Path) -> list[Path]:
    """Return the path of each picture in the output folder: JPEG for JPEG, else PNG.

    Raises:
        UsageError: A picture would replace an image.
    """
    inputs = {Path(file.name).resolve() for file in files}
    paths: dict[Path, None] = {}
    for file in files:
        # A member of an archive may have a name such as ../a.png, which must stay in the folder.
        parts = [part for part in PurePosixPath(file.short_name).parts if part not in ("/", "..")]
        path = folder.joinpath(*parts or ["image"])
        path = path if path.suffix.lower() in _JPEG else path.with_suffix(".png")
        if path.resolve() in inputs:
            raise UsageError(f"--output-dir must not be the folder of the images, got {folder}")
        # Images of several folders may have the same name.
        names = (path.with_stem(f"{path.stem}_{number}") for number in count(2))
        paths[next(name for name in chain([path], names) if name not in paths)] = None
    return list(paths)


def _save_picture(pixels: Tensor, found: Detections, path: Path) -> None:
    """Draw detections and write the picture."""
    from detection.drawing import draw

    check_writable(path.parent)
    with replacing(path, suffix=path.suffix) as temporary:
        draw(pixels, found).save(temporary, quality=95)


def _line(name: str, found: Detections) -> str:
    """Return the objects of an image in one line, the boxes as x1 y1 x2 y2."""
    rows = zip(
        found.classes, found.scores.tolist(), found.boxes.round().int().tolist(), strict=True
    )
    objects = [f"{label} {score:.2f} {box}" for label, score, box in rows]
    return f"{printable(name)}: " + ("; ".join(objects) or "no objects")
