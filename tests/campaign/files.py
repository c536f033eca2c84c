"""Damaged image files, and what may be in the place of a file: pipes, devices, links, folders."""

import io
import os
import random
from pathlib import Path

from PIL import Image

from tests.campaign.mutations import mutate_bytes, resize_png

__all__ = ["damage_image", "write_special"]


def damage_image(rng: random.Random, path: Path) -> None:
    """Damage an image file, or put another kind of image or file in its place."""
    content = path.read_bytes()
    kind = rng.choice(("bytes", "bytes", "bytes", "claim", "special", "mode", "format", "exif"))
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    if kind == "bytes":
        path.write_bytes(mutate_bytes(rng, content))
        return
    if kind == "special":
        path.unlink()
        write_special(rng, path)
        return
    if kind == "mode":
        mode = rng.choice(("1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "F", "I"))
        image = (
            image.convert("L").convert(mode) if mode in ("I;16", "F", "I") else image.convert(mode)
        )
    if kind == "exif":
        image.getexif()[0x0112] = rng.randrange(10)
    name = "TIFF" if image.mode in ("F", "CMYK", "I", "I;16") else "PNG"
    if kind == "format":
        name = rng.choice(("GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA", "JPEG2000"))
    side = rng.choice((1, 7, 16, 400))
    buffer = io.BytesIO()
    image.resize((side, rng.choice((1, side)))).save(buffer, name, exif=image.getexif())
    content = buffer.getvalue()
    if kind == "claim":
        content = resize_png(content, rng.choice((0, 1, 10**5, 2**31 - 1)), rng.choice((0, 10**4)))
    path.write_bytes(content)


def write_special(rng: random.Random, path: Path) -> None:
    """Write something that is no regular file, or an empty one."""
    kind = rng.choice(("fifo", "zero", "folder", "loop", "missing", "empty"))
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "zero":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.touch()
