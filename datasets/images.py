"""Named images with integer classes: what the folder, tar and iNaturalist data sets share."""

import io
import os
import struct
import zlib
from collections.abc import Callable, Sequence, Sized
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from datasets.errors import CorruptImageError
from datasets.names import PackedNames

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

# What Pillow's decoders raise on damaged files.
_DECODING_ERRORS = (
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
    """Any map-style data set of (image, target) that knows the names of its classes.

    The target is a class number, or for detection a dictionary of tensors.
    """

    classes: Sequence[str]

    def __getitem__(self, index: int) -> tuple[Any, Any]: ...


def is_image_name(name: str) -> bool:
    """True for names of images; false for hidden files such as the `._x.jpg` of macOS archives."""
    base = name.rpartition("/")[2]
    return base.lower().endswith(IMAGE_EXTENSIONS) and not base.startswith(".")


def decode_rgb(data: bytes, name: str) -> Image.Image:
    """Decodes an image file to RGB.

    Args:
        data: The file's content.
        name: What to call the image in an error.

    Raises:
        CorruptImageError: The content is truncated, damaged or no image.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.convert("RGB")
    except _DECODING_ERRORS as error:
        # An unidentified image is reported by Pillow as "<_io.BytesIO object at 0x...>".
        reason = "no known format" if isinstance(error, Image.UnidentifiedImageError) else error
        raise CorruptImageError(f"corrupt image {name}: {reason}") from error


def read_bytes(path: Path) -> bytes:
    """Reads one image file.

    Raises:
        CorruptImageError: The file cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise CorruptImageError(f"cannot read image {path}: {error.strerror}") from error


class LabeledImages(Dataset[tuple[Any, int]]):
    """Base of the data sets: subclasses say how the bytes of image `i` are read.

    Args:
        source: Folder or archive, for messages.
        names: N image names.
        targets: (N,) int64, class of each image.
        classes: Class names in the order of their numbers.
        transform: Applied to the RGB image.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        names: PackedNames,
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
        """Class name to class number."""
        return {name: number for number, name in enumerate(self.classes)}

    @property
    def samples(self) -> list[tuple[str, int]]:
        """All (image name, class number), made anew at each call."""
        return list(zip(self.names, self.targets.tolist(), strict=True))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Returns the RGB image, transformed, and its class number.

        Raises:
            CorruptImageError: The image cannot be read or decoded.
        """
        data = self._read(index)
        image = decode_rgb(data, f"{self.source}: {self.names[index]}")
        return (self.transform(image) if self.transform else image), int(self.targets[index])

    def _read(self, index: int) -> bytes:
        raise NotImplementedError
