"""The stages of one training image of ImageNet, and the operations of RandAugment.

Each stage and operation is timed in all its versions, in turns, in one process. A time is the CPU
time per image, the median over the rounds.
"""

import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial
from importlib.util import find_spec
from typing import Any

from PIL import Image
from timm.data.auto_augment import AugmentOp
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from datasets import build_byte_transform, build_transform
from datasets.decoders import decode_pixels
from datasets.images import decode_rgb
from datasets.pixels import pack, to_image, to_uint8

__all__ = ["measure_stages"]

_BICUBIC = InterpolationMode.BICUBIC
_SIZE = [224, 224]
# A crop of usual size: top, left, height and width.
_CROP = (60, 80, 250, 300)

Times = dict[str, dict[str, float]]
Versions = dict[str, tuple[Callable[[Any], Any], list]]


def measure_stages(images: Iterable[tuple[str, bytes]], rounds: int) -> Times:
    """Return milliseconds per image by stage and version.

    Args:
        images: Names and contents of JPEG files of 500 x 375 pixels.
        rounds: Number of timed rounds, after one warm-up round.
    """
    stages = _stages([content for _, content in images])
    return {name: _measure(versions, rounds) for name, versions in stages.items()}


def _stages(files: list[bytes]) -> dict[str, Versions]:
    """Return the functions and their arguments, by stage and version."""
    pictures = [decode_rgb(file, "an image") for file in files]
    pixels = [to_uint8(picture) for picture in pictures]
    resized = [_torch_crop(image) for image in pixels]
    small = [to_image(image) for image in resized]
    decode: Versions = {"Pillow": (partial(decode_rgb, name="an image"), files)}
    if find_spec("simplejpeg") is not None:
        decode["simplejpeg"] = (partial(decode_pixels, name="an image"), files)
    stages: dict[str, Versions] = {
        "decode": decode,
        "crop and resize": {"Pillow": (_pillow_crop, pictures), "torch": (_torch_crop, pixels)},
    }
    ours, timms = _operations(build_byte_transform(True)), _operations(build_transform(True))
    theirs = _torchvision_operations()
    # Strided as decoded images are, and dense as torchvision's operations prefer.
    dense = [image.contiguous() for image in resized]
    for our, timm in zip(ours, timms, strict=True):
        name = timm.name.replace("Increasing", "").replace("Rel", "")
        versions: Versions = {"timm": (timm, small), "torchvision": (theirs[name], dense)}
        if our.aug_fn is not timm.aug_fn and name[:5] in ("Shear", "Trans"):
            versions["here"] = (our, small)
        stages[name] = versions
    return stages


def _measure(versions: Versions, rounds: int) -> dict[str, float]:
    """Return the milliseconds per image of each version."""
    times: dict[str, list[float]] = {name: [] for name in versions}
    for number in range(rounds + 1):
        for name in list(versions)[:: 1 if number % 2 else -1]:
            function, images = versions[name]
            start = time.process_time()
            for image in images:
                function(image)
            if number:
                times[name].append((time.process_time() - start) / len(images) * 1000)
    return {name: statistics.median(values) for name, values in times.items()}


def _pillow_crop(image: Image.Image) -> Image.Image:
    """Crop and resize with Pillow, as timm does."""
    return F.resize(F.crop(image, *_CROP), _SIZE, interpolation=_BICUBIC)


def _torch_crop(pixels: Tensor) -> Tensor:
    """Crop and resize uint8 pixels with torch."""
    return F.resize(pack(F.crop(pixels, *_CROP)), _SIZE, interpolation=_BICUBIC)


def _operations(transform: Any) -> list[AugmentOp]:
    """Return the operations of the RandAugment in a transform, each of which always runs."""
    operations = next(step.ops for step in transform.transforms if hasattr(step, "ops"))
    for operation in operations:
        operation.prob = 1.0
    return operations


def _torchvision_operations() -> dict[str, Callable[[Tensor], Tensor]]:
    """Return torchvision's operations on uint8 tensors, bilinear where bicubic is not supported."""
    bilinear = InterpolationMode.BILINEAR
    still: dict[str, Any] = {"angle": 0.0, "scale": 1.0, "interpolation": bilinear}
    affine = partial(F.affine, **still)
    return {
        "AutoContrast": F.autocontrast,
        "Equalize": F.equalize,
        "Invert": F.invert,
        "Rotate": partial(F.rotate, angle=27.0, interpolation=bilinear),
        "Posterize": partial(F.posterize, bits=4),
        "Solarize": partial(F.solarize, threshold=128.0),
        "SolarizeAdd": _solarize_add,
        "Color": partial(F.adjust_saturation, saturation_factor=1.8),
        "Contrast": partial(F.adjust_contrast, contrast_factor=1.8),
        "Brightness": partial(F.adjust_brightness, brightness_factor=1.8),
        "Sharpness": partial(F.adjust_sharpness, sharpness_factor=1.8),
        "ShearX": partial(affine, translate=[0, 0], shear=[15.0, 0.0]),
        "ShearY": partial(affine, translate=[0, 0], shear=[0.0, 15.0]),
        "TranslateX": partial(affine, translate=[60, 0], shear=[0.0, 0.0]),
        "TranslateY": partial(affine, translate=[0, 60], shear=[0.0, 0.0]),
    }


def _solarize_add(pixels: Tensor) -> Tensor:
    """Add to dark pixels, which torchvision has no operation for."""
    return pixels.where(pixels >= 128, (pixels + 99).clamp(max=255))
