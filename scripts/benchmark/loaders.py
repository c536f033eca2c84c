"""The loaders that `python -m scripts.benchmark data --part imagenet|coco` compares.

All read the same generated JPEG files with the same number of workers:

    ours         the loaders of the trainers, which decode with Pillow
    device       the loaders of the trainers with --augment_on device: what is left for the workers
    simplejpeg   the loaders of the trainers with --decoder simplejpeg, if it is installed
    floats       the loaders of the trainers with the transforms to normalized floats
    timm         timm's `create_loader` with the recipe of DeiT
    torchvision  torchvision's transforms with the same recipe, on PIL images, as in its references
"""

import json
import random
import resource
import time
from collections.abc import Callable, Iterable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, ImageDataset, create_loader
from torch.utils.data import DataLoader, default_collate
from torchvision import datasets as tv_datasets
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from classification import config as classification_config
from classification.data import build_split as build_classes
from classification.data import train_loader as classification_loader
from datasets import build_coco_transforms, build_transform, collate
from datasets.decoders import DecoderName
from datasets.transforms import allow_zero_bits
from detection import config as detection_config
from detection.data import build_split as build_boxes
from detection.data import train_loader as detection_loader

__all__ = ["COCO_BATCH", "IMAGENET_BATCH", "coco_loaders", "imagenet_loaders", "seconds_to_read"]

IMAGENET_BATCH, COCO_BATCH = 64, 4
_CPU = torch.device("cpu")
_BOXES = 7

Loaders = dict[str, Callable[[], Iterable]]


def seconds_to_read(loader: Iterable) -> tuple[float, float]:
    """Read all batches, and return the CPU time of the workers and the time that passed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    for _ in loader:
        pass
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime), wall


def imagenet_loaders(
    root: Path, images: Iterable[tuple[str, bytes]], workers: int = 1, size: int = 224
) -> Loaders:
    """Write images as a data set of two classes, and return functions that build the loaders."""
    for number, (name, content) in enumerate(images):
        path = root / "train" / "ab"[number % 2] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    flags = ["--data_path", str(root), "--input_size", str(size), "--num_workers", str(workers)]
    flags += ["--decoder", "pillow"]
    config = classification_config.parse_args([*flags, "--batch_size", str(IMAGENET_BATCH)])

    def ours(**options: str) -> DataLoader:
        data = build_classes(config.model_copy(update=options), "train")
        loader = classification_loader(data, config, _CPU)
        return _one_epoch(loader, loader.collate_fn)

    def floats() -> DataLoader:
        data = build_classes(config, "train")
        data.dataset.transform = build_transform(True, input_size=size)
        return _one_epoch(classification_loader(data, config, _CPU), default_collate)

    def timms() -> Iterable:
        loader = create_loader(
            ImageDataset(str(root / "train")),
            input_size=(3, size, size),
            batch_size=IMAGENET_BATCH,
            is_training=True,
            auto_augment="rand-m9-mstd0.5-inc1",
            interpolation="bicubic",
            re_prob=0.25,
            re_mode="pixel",
            num_workers=workers,
            persistent_workers=False,
            pin_memory=False,
            device=_CPU,
        )
        allow_zero_bits(loader.dataset.transform)
        return loader

    def torchvisions() -> DataLoader:
        bicubic = InterpolationMode.BICUBIC
        transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(size, interpolation=bicubic),
                transforms.RandomHorizontalFlip(),
                transforms.RandAugment(interpolation=bicubic),
                transforms.PILToTensor(),
                transforms.ConvertImageDtype(torch.float32),
                transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
                transforms.RandomErasing(0.25),
            ]
        )
        data = tv_datasets.ImageFolder(str(root / "train"), transform)
        return DataLoader(data, IMAGENET_BATCH, shuffle=True, num_workers=workers, drop_last=True)

    loaders = {
        "ours": ours,
        "device": partial(ours, augment_on="device"),
        "floats": floats,
        "timm": timms,
        "torchvision": torchvisions,
    }
    return _with_simplejpeg(loaders, partial(ours, decoder="simplejpeg"))


def coco_loaders(root: Path, images: Iterable[tuple[str, bytes]], workers: int = 1) -> Loaders:
    """Write images as a data set of COCO's format, and return functions that build the loaders."""
    folder, names = root / "train2017", []
    folder.mkdir(parents=True)
    for name, content in images:
        (folder / name).write_bytes(content)
        names.append(name)
    (root / "annotations").mkdir()
    path = root / "annotations" / "instances_train2017.json"
    path.write_text(json.dumps(_annotations(names)))
    flags = ["--coco_path", str(root), "--num_workers", str(workers)]
    config = detection_config.parse_args(
        [*flags, "--decoder", "pillow", "--batch_size", str(COCO_BATCH)]
    )

    def build(transform: Callable | None = None, decoder: DecoderName = "pillow") -> DataLoader:
        data = build_boxes(config.model_copy(update={"decoder": decoder}), "train")
        if transform is not None:
            data.dataset.transforms = transform
        return _one_epoch(detection_loader(data, config, _CPU), collate)

    loaders = {
        "ours": build,
        "floats": lambda: build(build_coco_transforms("train")),
        "torchvision": lambda: build(_detr_transform),
    }
    return _with_simplejpeg(loaders, partial(build, decoder="simplejpeg"))


def _with_simplejpeg(loaders: Loaders, loader: Callable[[], Iterable]) -> Loaders:
    """Add the loader that uses simplejpeg, if it is installed."""
    return loaders | ({"simplejpeg": loader} if find_spec("simplejpeg") is not None else {})


def _one_epoch(loader: DataLoader, collate_fn: Callable) -> DataLoader:
    """Return a similar loader whose workers end after the epoch, so that their time is counted."""
    names = ("batch_size", "sampler", "drop_last", "num_workers")
    options = {name: getattr(loader, name) for name in names}
    return DataLoader(loader.dataset, **options, collate_fn=collate_fn)


def _detr_transform(image: Image.Image, target: dict) -> tuple[torch.Tensor, dict]:
    """Transform an image and its boxes by the recipe of DETR."""
    boxes = target["boxes"].clone()
    if random.random() < 0.5:
        image = F.hflip(image)
        boxes[:, [0, 2]] = image.width - boxes[:, [2, 0]]
    sizes = [None, random.choice(range(480, 801, 32))]
    if random.random() < 0.5:
        sizes[0] = random.choice((400, 500, 600))
    for size in filter(None, sizes):
        old = image.width
        image = F.resize(image, size, max_size=None if size is sizes[0] else 1333)
        boxes *= image.width / old
        if size is sizes[0]:
            width, height = (random.randint(384, min(side, 600)) for side in image.size)
            left = random.randint(0, image.width - width)
            top = random.randint(0, image.height - height)
            image = F.crop(image, top, left, height, width)
            boxes = boxes - torch.tensor([left, top, left, top])
    pixels = F.normalize(F.to_tensor(image), IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    return pixels, target | {"boxes": boxes / max(image.size)}


def _annotations(names: list[str]) -> dict:
    """Return annotations with random boxes for images of 640 x 480 pixels."""
    draw = random.Random(0)
    boxes = [
        [draw.randrange(300), draw.randrange(200), draw.randrange(20, 300), draw.randrange(20, 200)]
        for _ in range(_BOXES * len(names))
    ]
    return {
        "images": [
            {"id": i, "file_name": name, "width": 640, "height": 480}
            for i, name in enumerate(names)
        ],
        "categories": [{"id": 1, "name": "thing"}],
        "annotations": [
            {"id": i, "image_id": i // _BOXES, "category_id": 1, "bbox": box, "iscrowd": 0}
            | {"area": box[2] * box[3]}
            for i, box in enumerate(boxes)
        ],
    }
