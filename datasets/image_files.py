"""Images to predict: files, folders, patterns, members of archives, and URLs.

Names are read when they are needed, in any worker. An image with an EXIF orientation is turned
upright, as viewers show it.
"""

import contextlib
import glob
import http.client
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from datasets.archives import Archive, TarArchive, ZipArchive
from datasets.errors import CorruptImageError, DataError
from datasets.images import decode_rgb, is_image_name, read_bytes, to_rgb

__all__ = [
    "ImageFile",
    "ImageFiles",
    "ImageInput",
    "find_images",
    "open_image",
    "read_image",
]

ImageInput = str | os.PathLike[str] | Image.Image | np.ndarray

_ARCHIVES: dict[str, type[Archive]] = {".zip": ZipArchive, ".tar": TarArchive}
_TIMEOUT = 30.0  # seconds to wait for an answer
_LARGEST_DOWNLOAD = 1 << 28  # bytes
_WEB_PAGE = re.compile(rb"\s*<(!doctype html|html|head|\?xml)", re.IGNORECASE)


class ImageFile(NamedTuple):
    """An image to read.

    Attributes:
        name: Path, `archive.zip/member` or URL.
        short_name: Path relative to the folder or archive that the user gave; the file name for a
            file, a member of an archive, a pattern or a URL.
    """

    name: str
    short_name: str


class ImageFiles(Dataset[Any]):
    """Images by index, as the results of a function.

    An image that cannot be read is its `CorruptImageError`, so that the others can be processed.

    Args:
        names: Names of the images, see `read_image`.
        transform: Function applied to the RGB image.
    """

    def __init__(self, names: Iterable[str], transform: Callable[[Image.Image], Any]) -> None:
        self.names = list(names)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Any:
        """Return the transformed image, or the error that explains why there is none."""
        try:
            return self.transform(read_image(self.names[index]))
        except CorruptImageError as error:
            return error


def find_images(sources: Iterable[str]) -> list[ImageFile]:
    """Find all images that some words name, each once, in the order of the words.

    Args:
        sources: Files, folders and archives (`.zip`, uncompressed `.tar`), which are searched with
            their subfolders, members (`archive.zip/member`), patterns such as `photos/**/*.jpg`,
            and URLs.

    Raises:
        DataError: A word names no image.
    """
    found: dict[str, ImageFile] = {}
    for source in sources:
        images = list(_find(source))
        if not images:
            raise DataError(
                f"no image found in {source}: expected a file, folder, pattern, archive member or "
                "URL of images (.jpg, .png, .webp, ...)"
            )
        for image in images:
            found.setdefault(image.name, image)
    return list(found.values())


def read_image(name: str) -> Image.Image:
    """Read an image and turn it upright by its EXIF orientation.

    Args:
        name: Path, `archive.zip/member` or URL.

    Returns:
        The RGB image.

    Raises:
        CorruptImageError: The image cannot be read or decoded, or is too large.
    """
    data = _read(name)
    if _WEB_PAGE.match(data[:1024]):
        raise CorruptImageError(f"{name} must be an image, got a web page or XML text")
    try:
        image = decode_rgb(data, name)
    except CorruptImageError as error:
        if isinstance(error.__cause__, Image.DecompressionBombError):
            raise CorruptImageError(f"image {name} is too large: {error.__cause__}") from error
        raise
    return _upright(image)


def open_image(image: ImageInput) -> Image.Image:
    """Return an image of any kind as an upright RGB image.

    Args:
        image: A name (see `read_image`), a PIL image, or a uint8 array (H, W, 3) in RGB or (H, W)
            in gray.

    Raises:
        CorruptImageError: The image cannot be read or decoded.
        ValueError: The object is not an image.
    """
    if isinstance(image, str | os.PathLike):
        return read_image(os.fspath(image))
    if isinstance(image, Image.Image):
        return _upright(image)
    kind = type(image).__name__
    if isinstance(image, np.ndarray):
        if image.dtype == np.uint8 and image.size and image.shape[2:] in ((), (3,)):
            return Image.fromarray(image).convert("RGB")
        kind = f"a {image.dtype} array of shape {image.shape}"
    raise ValueError(
        f"image must be a path, a URL, a PIL image or a uint8 array (H, W, 3) or (H, W), got {kind}"
    )


def _upright(image: Image.Image) -> Image.Image:
    """Return an image as viewers show it: turned by its EXIF orientation, in RGB."""
    # Damaged EXIF data has no orientation.
    with contextlib.suppress(SyntaxError, ValueError, TypeError, OSError, LookupError):
        image = ImageOps.exif_transpose(image)
    return to_rgb(image)


def _is_url(name: str) -> bool:
    """Return whether a name is an `http(s)://` URL."""
    return name.startswith(("http://", "https://"))


def _find(source: str) -> Iterator[ImageFile]:
    """Yield the images that a word names."""
    path = Path(source)
    archive = _archive_in(source)
    if _is_url(source):
        yield ImageFile(source, _url_file(source))
    elif path.is_dir():
        yield from _files_in(path)
    elif archive is not None:
        yield from _members_of(*archive)
    elif path.is_file():
        yield ImageFile(source, path.name)
    elif glob.has_magic(source):
        for match in sorted(glob.glob(source, recursive=True)):  # noqa: PTH207  (also absolute)
            if Path(match).is_file() and is_image_name(match):
                yield ImageFile(match, Path(match).name)


def _files_in(folder: Path) -> Iterator[ImageFile]:
    """Yield the images in a folder and its subfolders, sorted."""
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        for file in sorted(filter(is_image_name, files)):
            path = Path(parent, file)
            yield ImageFile(str(path), path.relative_to(folder).as_posix())


def _archive_in(source: str) -> tuple[Path, str] | None:
    """Split `archive.zip/member` into archive and member; None if no archive is named."""
    for path in (Path(source), *Path(source).parents):
        if path.suffix.lower() in _ARCHIVES and path.is_file():
            member = Path(source).relative_to(path).as_posix()
            return path, "" if member == "." else member
    return None


def _members_of(path: Path, member: str) -> Iterator[ImageFile]:
    """Yield a member of an archive, or all images in it or in one of its folders."""
    names = _open_archive(path).names
    for name in names:
        inside = name == member or not member or name.startswith(f"{member}/")
        if inside and (name == member or is_image_name(name)):
            short_name = Path(name).name if name == member else name
            yield ImageFile(f"{path}/{name}", short_name)


@lru_cache(maxsize=16)
def _open_archive(path: Path) -> Archive:
    """Open an archive once per process."""
    return _ARCHIVES[path.suffix.lower()](path)


def _read(name: str) -> bytes:
    """Read the content of an image."""
    if _is_url(name):
        return _download(name)
    if not Path(name).is_file() and (archive := _archive_in(name)) is not None:
        try:
            return _open_archive(archive[0]).read(archive[1])
        except DataError as error:
            raise CorruptImageError(str(error)) from error
    return read_bytes(Path(name))


def _url_file(url: str) -> str:
    """Return the file name in a URL."""
    return urllib.parse.unquote(Path(urllib.parse.urlsplit(url).path).name) or "image"


def _download(url: str) -> bytes:
    """Download an image into memory."""
    request = urllib.request.Request(_ascii(url), headers={"User-Agent": "irpe-framework"})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
            data = response.read(_LARGEST_DOWNLOAD + 1)
            missing = response.length
    except urllib.error.HTTPError as error:
        error.close()
        raise CorruptImageError(
            f"cannot download {url}: the server answered {error.code} {error.reason}"
        ) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise CorruptImageError(f"cannot download {url}: {reason}") from error
    if len(data) > _LARGEST_DOWNLOAD:
        raise CorruptImageError(
            f"cannot download {url}: it has more than {_LARGEST_DOWNLOAD} bytes"
        )
    if missing:
        raise CorruptImageError(
            f"cannot download {url}: the connection broke off at {len(data)} bytes"
        )
    return data


def _ascii(url: str) -> str:
    """Percent-encode the characters of a URL that HTTP does not allow."""
    return urllib.parse.quote(url, safe=":/?#[]@!$&'()*+,;=%~")
