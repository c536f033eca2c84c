"""Decoding of every image in parallel, through the same readers as in a training."""

import hashlib
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from datasets.check.findings import Finding
from datasets.errors import CorruptImageError
from datasets.images import decode_rgb, fits_upright, orientation_of

__all__ = ["Picture", "read_pictures", "find_bad_pictures", "find_wrong_sizes"]

_BATCH = 8
# As in `ResilientDataset`: a training stops above this fraction, from this number on.
_MAX_BAD_FRACTION, _MIN_BAD = 0.01, 10


class _Source(Protocol):
    """Image files by index."""

    def read(self, index: int) -> bytes:
        """Read image file `index`."""
        ...


@dataclass(frozen=True)
class Picture:
    """The properties of one image file.

    Attributes:
        name: Name of the file.
        error: Reason why it cannot be read; an empty string if it can.
        stored: Width and height of the stored pixels; (0, 0) if it cannot be read.
        orientation: EXIF orientation, 1 to 8.
        upright: True if training turns the image upright, because its annotated size fits.
        digest: Hash of the RGB pixels as in training.
    """

    name: str
    error: str = ""
    stored: tuple[int, int] = (0, 0)
    orientation: int = 1
    upright: bool = False
    digest: bytes = b""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in training."""
        return self.stored[::-1] if self.upright else self.stored


@dataclass(frozen=True)
class _Pictures(Dataset[Picture]):
    """The pictures of a source by index."""

    source: _Source
    names: Sequence[str]
    sizes: np.ndarray | None

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Picture:
        name = self.names[index]
        annotated = None if self.sizes is None else tuple(self.sizes[index].tolist())
        # Pillow warns of damaged metadata and of large images, without the name of the image.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                data = self.source.read(index)
                image = decode_rgb(data, name, annotated)
            except CorruptImageError as error:
                return Picture(name, str(error))
            # The EXIF data is read from the file, because RGB conversion may drop it.
            with Image.open(io.BytesIO(data)) as header:
                stored, orientation = header.size, orientation_of(header)
                upright = fits_upright(header, annotated)
        digest = hashlib.blake2b(image.tobytes(), digest_size=16)
        digest.update(repr(image.size).encode())
        return Picture(name, "", stored, orientation, upright, digest.digest())


def read_pictures(
    source: _Source,
    names: Sequence[str],
    sizes: np.ndarray | None = None,
    *,
    title: str,
    num_workers: int,
) -> list[Picture]:
    """Decode all images of a source, with a progress bar on stderr.

    Args:
        source: Image files by index.
        names: Names of the N images.
        sizes: Annotated widths and heights, (N, 2); 0 where unknown.
        title: Title of the progress bar.
        num_workers: Number of processes that decode; 0 decodes in this process.

    Returns:
        The N pictures in the order of their names.
    """
    loader = DataLoader(
        _Pictures(source, names, sizes),
        batch_size=_BATCH,
        collate_fn=list,
        num_workers=num_workers,
    )
    found: list[Picture] = []
    with tqdm(total=len(names), desc=title, unit=" images", disable=None) as bar:
        for batch in loader:
            found += batch
            bar.update(len(batch))
    return found


def find_bad_pictures(pictures: Sequence[Picture], split: str) -> list[Finding]:
    """Return the finding of images that cannot be read or decoded, if there are any."""
    bad = [picture for picture in pictures if picture.error]
    if not bad:
        return []
    stops = len(bad) >= _MIN_BAD and len(bad) > _MAX_BAD_FRACTION * len(pictures)
    meaning = "Training replaces each by another image, and stops above --max_bad_fraction."
    examples = [picture.error for picture in bad]
    return [
        Finding(
            "error" if stops else "warning", "corrupt images", split, len(bad), meaning, examples
        )
    ]


def find_wrong_sizes(pictures: Sequence[Picture], sizes: np.ndarray, split: str) -> list[Finding]:
    """Return the findings of annotated sizes: images of another size, and EXIF rotation.

    Args:
        pictures: The N images.
        sizes: Annotated widths and heights, (N, 2); 0 where unknown.
        split: Name of the split.
    """
    wrong, fitting, ambiguous = [], [], []
    for picture, (width, height) in zip(pictures, sizes.tolist(), strict=True):
        if picture.error:
            continue
        if width and picture.size != (width, height):
            stored = " x ".join(map(str, picture.stored))
            wrong.append(f"{picture.name}: annotated {width} x {height}, stored {stored}")
        elif picture.orientation != 1:
            known = width != height and picture.orientation >= 5
            (fitting if known else ambiguous).append(picture)
    findings = []
    if wrong:
        meaning = (
            "The boxes were made for another size than that of the file and are in the wrong place."
        )
        findings.append(
            Finding("warning", "images of another size", split, len(wrong), meaning, wrong)
        )
    if ambiguous:
        meaning = (
            "Width and height do not tell if the upright view was annotated; pixels are used as "
            "stored. Look at the boxes, or save the images upright without EXIF orientation."
        )
        examples = [_orientation(picture) for picture in ambiguous]
        kind = "EXIF-rotated images with unknown view"
        findings.append(Finding("warning", kind, split, len(ambiguous), meaning, examples))
    if fitting:
        turned = sum(picture.upright for picture in fitting)
        meaning = (
            f"By their annotated size, {turned} are turned upright and {len(fitting) - turned} are "
            "used as stored."
        )
        examples = [_orientation(picture) for picture in fitting]
        kind = "EXIF-rotated images"
        findings.append(Finding("note", kind, split, len(fitting), meaning, examples))
    return findings


def _orientation(picture: Picture) -> str:
    """Return name and orientation of an image for a report."""
    return f"{picture.name}: orientation {picture.orientation}"
