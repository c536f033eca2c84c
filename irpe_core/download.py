"""Download of checkpoints: resumable, and by one process at a time.

The received bytes are kept in `<name>.part`, and the version of the file that they belong to in
`<name>.part.json`. A later call requests only the missing bytes (RFC 9110: `Range` with
`If-Range`). A server that does not support ranges, or that has another version now, sends the whole
file, and the download starts again. Only a complete file gets its final name. The partial file is
also the lock, which the operating system releases when a process dies. Other processes wait for it
and then find the complete file.

`<name>.json` records URL, version, size and SHA-256 of a complete file. If the name is taken by the
file of another URL, the file gets a folder of its own, whose name is a hash of its URL.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import torch

from irpe_core.errors import CheckpointError
from irpe_core.web import append, file_name, reason_of, request, version_of

__all__ = ["cache_path", "download", "record", "sha256_of"]

logger = logging.getLogger(__name__)

_CHUNK = 1 << 20  # bytes
# The start of the SHA-256 in the names of torchvision's files.
_HASHED = re.compile(r"-([0-9a-f]{8,64})\.[^.]+$")
_HASHING_HOST = "download.pytorch.org"
_THIS_MACHINE = ("localhost", "127.0.0.1", "::1")


def download(
    url: str,
    directory: str | Path | None = None,
    *,
    sha256: str | None = None,
    progress: bool = True,
    mirror: str | None = None,
) -> Path:
    """Download a file, unless it exists already.

    Several processes may call the function for the same file at the same time: one downloads, the
    others wait. A call after an interrupted download continues it.

    Args:
        url: An `https://` URL, whose last part is the name of the file. An `http://` URL of another
            machine without `sha256` gives a warning.
        directory: Folder of the file; None for the checkpoints of the torch hub cache.
        sha256: Checksum of the file in hexadecimal. An existing file is checked too.
        progress: Show a progress bar in the process that downloads, if stderr is a terminal.
        mirror: URL to download from instead of `url`.

    Returns:
        The path of the file.

    Raises:
        CheckpointError: The URL cannot be downloaded, the connection breaks (the received bytes
            are kept if the server names the version of the file), the checksum differs, or the
            folder cannot be written.
    """
    source = mirror or url
    file_name(source)
    hashed = _HASHED.search(file_name(url))
    if sha256 is None and hashed and urlsplit(url).hostname == _HASHING_HOST:
        sha256 = hashed[1]
    path = part = cache_path(url, directory)
    try:
        while True:
            path = cache_path(url, directory)
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f"{path.name}.part")
            with _locked(part, path) as file:
                # Another process may have stored another file of this name meanwhile.
                if cache_path(url, directory) != path:
                    continue
                if file is not None:
                    _warn_if_open(source, sha256)
                    version = _complete(file, source, part, sha256, progress)
                    record(path, url, part, version)
                    part.replace(path)
                    _notes(part).unlink(missing_ok=True)
                else:
                    _check_existing(path, url, sha256)
                return path
    except OSError as error:
        raise CheckpointError(
            f"cannot store {url} as {error.filename or part}: {reason_of(error)}"
        ) from error


def cache_path(url: str, directory: str | Path | None = None) -> Path:
    """Return the path at which `download` stores a file; it need not exist.

    Args:
        url: URL of the file.
        directory: Folder of the file; None for the checkpoints of the torch hub cache.

    Raises:
        CheckpointError: The URL does not name a file, or its scheme is not allowed.
    """
    name = file_name(url)
    folder = Path(directory) if directory else Path(torch.hub.get_dir()) / "checkpoints"
    owner = _read_notes(folder / name).get("url")
    if owner in (None, url):
        return folder / name
    return folder / hashlib.sha256(url.encode()).hexdigest()[:16] / name


def record(path: Path, url: str, content: Path, version: str | None = None) -> None:
    """Record the URL of a file in the cache.

    Args:
        path: Path of the file, which need not exist yet.
        url: URL of the file.
        content: Path of its content, for size and checksum.
        version: Version of the file that the server names.
    """
    facts = {"url": url, "version": version}
    facts |= {"size": content.stat().st_size, "sha256": sha256_of(content)}
    _write_notes(path, facts)


def _check_existing(path: Path, url: str, sha256: str | None) -> None:
    """Check a file that was there before: its origin, size and, if it is known, its checksum."""
    facts = _read_notes(path)
    if not facts and not sha256:
        logger.warning(
            "%s is used for %s, but where it came from is not recorded: delete it if it is "
            "another file",
            path,
            url,
        )
    size = path.stat().st_size
    if facts.get("size", size) != size:
        raise CheckpointError(
            f"{str(path)!r} has {size} bytes instead of {facts['size']}: "
            "remove it to download it again"
        )
    if sha256 and not (found := sha256_of(path)).startswith(sha256.lower()):
        raise CheckpointError(
            f"{str(path)!r} has the SHA-256 {found} instead of {sha256}: "
            "remove it to download it again"
        )


def _warn_if_open(url: str, sha256: str | None) -> None:
    """Warn of a file that arrives without encryption and is not compared with a checksum."""
    parts = urlsplit(url)
    if sha256 is None and parts.scheme == "http" and parts.hostname not in _THIS_MACHINE:
        logger.warning("%s is not encrypted: anyone on the way can replace the file", url)


@contextmanager
def _locked(part: Path, path: Path) -> Iterator[BinaryIO | None]:
    """Open and lock the partial file; yield None if `path` exists, now or after waiting."""
    import fcntl  # only on POSIX systems

    while not path.is_file():
        with _open_part(part) as file:
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


def _complete(
    file: BinaryIO, url: str, part: Path, sha256: str | None, progress: bool
) -> str | None:
    """Download the missing part of the file, check the whole and return the version of the file.

    An empty file is removed.
    """
    try:
        have, version = _kept(file, url, part)
        response, start, total = request(url, have, version)
        with response:
            if start == 0:
                file.truncate(0)
                version = version_of(response)
                _write_notes(part, {"url": url, "version": version})
            logger.info("downloading %s from byte %d of %s", url, start, total or "?")
            size, why = append(response, file, part.stem, total, progress)
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
        if sha256 and not (found := sha256_of(part)).startswith(sha256.lower()):
            file.truncate(0)
            raise CheckpointError(
                f"{url} has the SHA-256 {found} instead of {sha256}: the download is removed"
            )
        os.fsync(file.fileno())
        return version
    finally:
        if os.fstat(file.fileno()).st_size == 0:
            part.unlink(missing_ok=True)
            _notes(part).unlink(missing_ok=True)


def _open_part(path: Path) -> BinaryIO:
    """Open a partial file to append to it; a link or a pipe of this name is an error."""
    return open(path, "ab", buffering=0, opener=_open_own)


def _open_own(path: str, flags: int) -> int:
    """Open a file of this module, which must be neither a link nor a pipe without reader."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)


def _notes(path: Path) -> Path:
    """Return the path of the notes about a file."""
    return path.with_name(f"{path.name}.json")


def _read_notes(path: Path) -> dict[str, Any]:
    """Return the notes about a file; an empty dict if there are none."""
    try:
        facts = json.loads(_notes(path).read_text())
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _write_notes(path: Path, facts: dict[str, Any]) -> None:
    """Write the notes about a file."""
    with open(_notes(path), "w", opener=_open_own) as file:
        json.dump(facts, file)


def _kept(file: BinaryIO, url: str, part: Path) -> tuple[int, str | None]:
    """Return the size and version of the bytes of an earlier call; (0, None) if not usable."""
    facts = _read_notes(part)
    version = facts.get("version") if facts.get("url") == url else None
    usable = isinstance(version, str)
    return (os.fstat(file.fileno()).st_size, version) if usable else (0, None)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 checksum of a file in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
