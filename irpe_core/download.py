"""Download of checkpoints: resumable, and by one process at a time.

The received bytes are kept in `<name>.part`, and the version of the file that they belong to in
`<name>.part.json`. A later call requests only the missing bytes (RFC 9110: `Range` with
`If-Range`). A server that does not support ranges, or that has another version now, sends the whole
file, and the download starts again. Only a complete file gets its final name. The partial file is
also the lock, which the operating system releases when a process dies. Other processes wait for it
and then find the complete file.
"""

import hashlib
import json
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import BinaryIO
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import torch

from irpe_core.errors import CheckpointError

__all__ = ["download", "sha256_of"]

logger = logging.getLogger(__name__)

_TIMEOUT = 30.0  # seconds to wait for an answer or for more data
_CHUNK = 1 << 20  # bytes


def download(
    url: str,
    directory: str | Path | None = None,
    *,
    sha256: str | None = None,
    progress: bool = True,
) -> Path:
    """Download a file, unless a file with its name exists already.

    Several processes may call the function for the same file at the same time: one downloads, the
    others wait. A call after an interrupted download continues it.

    Args:
        url: An `http(s)://` URL. Its last part is the name of the file.
        directory: Folder of the file; None for the checkpoints of the torch hub cache.
        sha256: Checksum of the file in hexadecimal. An existing file is checked too.
        progress: Show a progress bar in the process that downloads, if stderr is a terminal.

    Returns:
        The path of the file.

    Raises:
        CheckpointError: The URL cannot be downloaded, the connection breaks (the received bytes
            are kept if the server names the version of the file), the checksum differs, or the
            folder cannot be written.
    """
    name = _file_name(url)
    folder = Path(directory) if directory else Path(torch.hub.get_dir()) / "checkpoints"
    path, part = folder / name, folder / f"{name}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(part, path) as file:
            if file is not None:
                _complete(file, url, part, sha256, progress)
                part.replace(path)
                _notes(part).unlink(missing_ok=True)
            elif sha256 and (found := sha256_of(path)) != sha256.lower():
                raise CheckpointError(
                    f"{str(path)!r} has the SHA-256 {found} instead of {sha256}: "
                    "remove it to download it again"
                )
    except OSError as error:
        raise CheckpointError(
            f"cannot store {url} as {error.filename or part}: {_why(error)}"
        ) from error
    return path


def _file_name(url: str) -> str:
    """Return the file name in a URL; raise CheckpointError if there is none."""
    try:
        parts = urlsplit(url)
        name, host = Path(parts.path).name, parts.hostname
    except ValueError:
        name = host = None
    if not host or parts.scheme not in ("http", "https") or name in ("", ".."):
        raise CheckpointError(f"url must be the http:// or https:// URL of a file, got {url!r}")
    return name


@contextmanager
def _locked(part: Path, path: Path) -> Iterator[BinaryIO | None]:
    """Open and lock the partial file; yield None if `path` exists, now or after waiting."""
    import fcntl  # only on POSIX systems

    while not path.is_file():
        with part.open("ab", buffering=0) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info("waiting for another process that downloads %s", path.name)
                fcntl.flock(file, fcntl.LOCK_EX)
            if _is_at(file, part):
                yield file
                return
    yield None


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Return whether `path` is still the open file; another process may have renamed it."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _complete(file: BinaryIO, url: str, part: Path, sha256: str | None, progress: bool) -> None:
    """Download the missing part of the file and check the whole; remove the file if it is empty."""
    notes = _notes(part)
    try:
        have, version = _kept(file, url, notes)
        response, start, total = _request(url, have, version)
        with response:
            if start == 0:
                file.truncate(0)
                version = _version(response)
                notes.write_text(json.dumps({"url": url, "version": version}))
            logger.info("downloading %s from byte %d of %s", url, start, total or "?")
            size, why = _copy(response, file, part.stem, total, progress)
        if why or total not in (None, size):
            kept = f"which are kept in {part}"
            if not version:
                kept = (
                    "and the next call starts from the beginning, because the server does not name "
                    "the version of the file"
                )
            raise CheckpointError(
                f"the download of {url} broke off at {size} of {total or 'unknown'} bytes, "
                f"{kept}: {why or 'the server closed the connection'}"
            )
        if sha256 and (found := sha256_of(part)) != sha256.lower():
            file.truncate(0)
            raise CheckpointError(
                f"{url} has the SHA-256 {found} instead of {sha256}: the download is removed"
            )
        os.fsync(file.fileno())
    finally:
        if os.fstat(file.fileno()).st_size == 0:
            part.unlink(missing_ok=True)
            notes.unlink(missing_ok=True)


def _notes(part: Path) -> Path:
    """Return the path of the notes (URL and version) about a partial file."""
    return part.with_name(f"{part.name}.json")


def _kept(file: BinaryIO, url: str, notes: Path) -> tuple[int, str | None]:
    """Return the size and version of the bytes of an earlier call; (0, None) if not usable."""
    try:
        known = json.loads(notes.read_text())
        version = known["version"] if known["url"] == url else None
    except (OSError, ValueError, KeyError, TypeError):
        version = None
    return (os.fstat(file.fileno()).st_size if version else 0), version


def _version(response: HTTPResponse) -> str | None:
    """Return the value for `If-Range`: a strong entity tag, or else the date of the last change."""
    tag = response.headers.get("ETag", "")
    return tag if tag.startswith('"') else response.headers.get("Last-Modified")


def _request(url: str, have: int, version: str | None) -> tuple[HTTPResponse, int, int | None]:
    """Request the missing bytes; return the response, its first byte and the length of the file."""
    headers = {"User-Agent": "irpe_core"}
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": version}
    try:
        response = urlopen(Request(url, headers=headers), timeout=_TIMEOUT)
    except HTTPError as error:
        error.close()
        if error.code == 416 and have:
            return _request(url, 0, None)
        raise CheckpointError(
            f"cannot download {url}: the server answered {error.code} {error.reason}"
        ) from error
    except (OSError, HTTPException, ValueError) as error:
        raise CheckpointError(f"cannot download {url}: {_why(error)}") from error
    length = response.headers.get("Content-Length", "")
    if response.status == 206 and have:
        place = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        if place and int(place[1]) == have:
            return response, have, int(place[2])
        response.close()
        return _request(url, 0, None)
    problem = None
    if response.status != 200:
        problem = f"the server answered {response.status} {response.reason}"
    elif response.headers.get_content_type() == "text/html":
        problem = "the server sent a web page instead of a file"
    elif not (length.isdigit() and int(length) > 0) and not response.chunked:
        problem = "the server does not say how long the file is, or it is empty"
    if problem:
        response.close()
        raise CheckpointError(f"cannot download {url}: {problem}")
    return response, 0, None if response.chunked else int(length)


def _copy(
    response: HTTPResponse, file: BinaryIO, title: str, total: int | None, progress: bool
) -> tuple[int, str | None]:
    """Append the response to the file; return the new size, and the error that ended it or None."""
    size = file.seek(0, os.SEEK_END)
    bar = torch.hub.tqdm(
        total=total,
        initial=size,
        desc=title,
        disable=not (progress and sys.stderr.isatty()),
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
    )
    bar.n = size  # torch's substitute for a missing tqdm ignores `initial`
    with bar:
        while True:
            try:
                chunk = response.read1(_CHUNK)
            except (OSError, HTTPException) as error:
                return size, _why(error)
            if not chunk:
                return size, None
            rest = memoryview(chunk)
            while rest:
                rest = rest[file.write(rest) :]
            size += len(chunk)
            bar.update(len(chunk))


def sha256_of(path: Path) -> str:
    """Return the SHA-256 checksum of a file in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _why(error: Exception) -> str:
    """Return the reason of an error without error numbers and wrapping exceptions."""
    if isinstance(error, URLError) and isinstance(error.reason, Exception):
        error = error.reason
    if isinstance(error, TimeoutError):
        return f"no answer within {_TIMEOUT:g} s"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
