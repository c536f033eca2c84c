"""Decoders of JPEG files for training: Pillow, or the optional package simplejpeg.

simplejpeg returns the pixels of Pillow without the copies of Pillow, so a choice changes no result.
The transforms of evaluation need images of Pillow, and do not use it.
"""

import importlib
import io
import logging
from collections.abc import Callable
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from datasets.errors import DataError
from datasets.images import DECODING_ERRORS, decode_rgb, fits_upright

__all__ = ["Decode", "DecoderName", "decode_pixels", "find_decoder"]

DecoderName = Literal["auto", "pillow", "simplejpeg"]

Decode = Callable[..., Image.Image | Tensor]
"""A function with the arguments of `decode_rgb`."""

logger = logging.getLogger(__name__)


def find_decoder(name: DecoderName) -> Decode:
    """Return the function that decodes image files, and log which one it is.

    Args:
        name: `pillow`, `simplejpeg`, or `auto` for simplejpeg if it is installed.

    Raises:
        DataError: simplejpeg is not installed.
    """
    if name == "pillow":
        return decode_rgb
    try:
        importlib.import_module("simplejpeg")
    except ModuleNotFoundError as error:
        if name == "simplejpeg":
            raise DataError(
                "--decoder simplejpeg needs the package simplejpeg: pip install simplejpeg"
            ) from error
        logger.info("JPEG decoder: Pillow (`pip install simplejpeg` for a faster one)")
        return decode_rgb
    logger.info("JPEG decoder: simplejpeg")
    return decode_pixels


def decode_pixels(
    data: bytes, name: str, annotated: tuple[int, int] | None = None
) -> Image.Image | Tensor:
    """Decode an image file to RGB as `decode_rgb` does, with simplejpeg where it can.

    Files of other formats, CMYK images and files with any damage are left to Pillow.

    Args:
        data: Content of the file.
        name: Name of the image in error messages.
        annotated: Width and height according to the annotations; see `fits_upright`.

    Returns:
        For a JPEG file, its pixels uint8 `(3, H, W)`, in memory as `(H, W, 3)`; else the image.

    Raises:
        CorruptImageError: The content is truncated, damaged or not an image.
    """
    import simplejpeg

    try:
        with Image.open(io.BytesIO(data)) as header:
            plain = header.format == "JPEG" and header.mode in ("RGB", "L")
            plain = plain and not fits_upright(header, annotated)
        if plain:
            return torch.from_numpy(simplejpeg.decode_jpeg(data)).permute(2, 0, 1)
    except DECODING_ERRORS:
        # Pillow reads some damaged files, and names the damage of the others.
        pass
    return decode_rgb(data, name, annotated)
