"""Images with a name and a class number: the common base of the classification data sets."""

import copy
import io
import os
import stat
import struct
import zlib
from collections.abc import Callable, Sequence, Sized
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import ExifTags, Image, ImageOps
from torch.utils.data import Dataset

from datasets.errors import CorruptImageError
from datasets.packed_strings import PackedStrings

__all__ = [
    "DECODING_ERRORS",
    "IMAGE_EXTENSIONS",
    "ImageDataset",
    "LabeledImages",
    "is_image_name",
    "orientation_of",
    "fits_upright",
    "decode_rgb",
    "read_bytes",
    "to_rgb",
]

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

# Exceptions that Pillow's decoders raise for damaged files.
DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    IndexError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class ImageDataset(Sized, Protocol):
    """A map-style data set of (image, target) with class names.

    The target is a class number; for detection it is a dictionary of tensors.
    """

    classes: Sequence[str]

    def __getitem__(self, index: int) -> tuple[Any, Any]: ...


def is_image_name(name: str) -> bool:
    """Return whether a name is that of an image; hidden files such as `._x.jpg` do not count."""
    base = name.rpartition("/")[2]
    return base.lower().endswith(IMAGE_EXTENSIONS) and not base.startswith(".")


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation of an opened image: 1 is upright, 5 to 8 swap width and height.

    Damaged or missing EXIF data counts as upright.
    """
    try:
        number = image.getexif().get(ExifTags.Base.Orientation, 1)
    except DECODING_ERRORS:
        return 1
    return number if number in range(1, 9) else 1


def fits_upright(image: Image.Image, annotated: tuple[int, int] | None) -> bool:
    """Return whether annotations were made on the upright view of an image with EXIF rotation.

    Some annotation tools show the pixels as stored, others turn them upright first. The annotated
    size tells which, because a rotation by 90 degrees swaps width and height.

    Args:
        image: An opened image file.
        annotated: Width and height in pixels according to the annotations; None if unknown.

    Returns:
        True if the annotated size is that of the upright view and not that of the stored pixels.
    """
    width, height = image.size
    return annotated == (height, width) and width != height and orientation_of(image) >= 5


def decode_rgb(data: bytes, name: str, annotated: tuple[int, int] | None = None) -> Image.Image:
    """Decode an image file to RGB.

    The pixels are returned as stored: an EXIF orientation is ignored, as in torchvision and timm.
    The only exception is an image whose annotations were made on its upright view.

    Args:
        data: Content of the file.
        name: Name of the image in error messages.
        annotated: Width and height according to the annotations; see `fits_upright`.

    Raises:
        CorruptImageError: The content is truncated, damaged or not an image.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            if fits_upright(image, annotated):
                return to_rgb(ImageOps.exif_transpose(image))
            return to_rgb(image)
    except DECODING_ERRORS as error:
        # Pillow's own message would name the buffer: "<_io.BytesIO object at 0x...>".
        reason = (
            "unknown image format" if isinstance(error, Image.UnidentifiedImageError) else error
        )
        raise CorruptImageError(f"corrupt image {name}: {reason}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to RGB with 8 bits per channel.

    16-bit gray values are divided by 256, as Pillow does with 16-bit colors. Pillow itself would
    clip them to 255, which makes such images white.

    Raises:
        ValueError: The gray values are 32-bit integers or floating-point numbers, which have no
            range that could be scaled to 8 bits.
    """
    # Pillow before 11 opens 16-bit gray PNG files as 32-bit integers.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floating-point numbers"
        raise ValueError(f"its gray values are {kind}, save it with 8 or 16 bits")
    return image.convert("RGB")


def read_bytes(path: Path) -> bytes:
    """Read one image file.

    Raises:
        CorruptImageError: The file cannot be read, or is a pipe or a device, which may have no end.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CorruptImageError(f"cannot read image {path}: it is not a regular file")
        return path.read_bytes()
    except OSError as error:
        raise CorruptImageError(f"cannot read image {path}: {error.strerror}") from error


class LabeledImages(Dataset[tuple[Any, int]]):
    """Base class of the classification data sets; subclasses read the bytes of an image.

    Args:
        source: Folder or archive, for error messages.
        names: Names of the N images.
        targets: Class number of each image, (N,) int64.
        classes: Class names in the order of their numbers.
        transform: Function applied to the RGB image. Its attribute `decode`, if it has one, decodes
            the files instead of `decode_rgb`.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        names: PackedStrings,
        targets: np.ndarray,
        classes: Sequence[str],
        transform: Callable[[Image.Image], Any] | None = None,
    ) -> None:
        self.source = Path(source)
        self.names = names
        self.targets = targets
        self.classes = list(classes)
        self.transform = transform

    @property
    def class_to_idx(self) -> dict[str, int]:
        """Class number of each class name."""
        return {name: number for number, name in enumerate(self.classes)}

    @property
    def samples(self) -> list[tuple[str, int]]:
        """Name and class number of every image; the list is built at each access."""
        return list(zip(self.names, self.targets.tolist(), strict=True))

    def select(self, positions: np.ndarray) -> "LabeledImages":
        """Return the images at the given positions, with the same classes.

        Args:
            positions: Positions of K of the images, (K,) int64.
        """
        chosen = copy.copy(self)
        chosen.names = PackedStrings.pack(self.names[i] for i in positions.tolist())
        chosen.targets = self.targets[positions]
        return chosen

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Return the transformed RGB image and its class number.

        Raises:
            CorruptImageError: The image cannot be read or decoded.
        """
        data = self.read(index)
        decode = getattr(self.transform, "decode", decode_rgb)
        image = decode(data, f"{self.source}: {self.names[index]}")
        return (self.transform(image) if self.transform else image), int(self.targets[index])

    def read(self, index: int) -> bytes:
        """Read the file of image `index`."""
        raise NotImplementedError
