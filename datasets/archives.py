"""Members of an uncompressed tar, read in place by any number of forked or spawned workers.

An archive object holds an index (see `archive_index`) and, per process, one descriptor. Reads go
through `pread`, which takes its own offset: processes that share a descriptor's file position
after a fork, as with `seek` and `read`, get each other's bytes.
"""

import logging
import os
import posixpath
import tarfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from datasets.archive_index import open_index, signature_of
from datasets.errors import CorruptImageError, DataError

logger = logging.getLogger(__name__)

_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}


class TarArchive:
    """An uncompressed tar as a read-only mapping from member name to content.

    Names are normalized (`./a/b.jpg` is `a/b.jpg`) and sorted. Directories and symbolic links are
    left out, hard links give the content they link to, and of several members with one name the
    last counts, as with `tar -x`. Pickles without its descriptor.

    Args:
        path: The archive.

    Raises:
        DataError: The archive is missing, compressed, truncated or not a tar.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._index = open_index(self.path, _scan_tar)
        self._descriptor: int | None = None
        self._owner: int | None = None

    @property
    def names(self) -> Sequence[str]:
        """All member names, sorted."""
        return self._index.names

    def __len__(self) -> int:
        return len(self._index.names)

    def read(self, member: str) -> bytes:
        """Returns the content of a member.

        Raises:
            DataError: There is no such member, or the archive changed since it was opened.
        """
        position = self._index.find(member)
        if position is None:
            raise DataError(f"{self.path} has no member {member!r}")
        return self.read_at(position)

    def read_at(self, position: int) -> bytes:
        """Returns the content of the member at `position` of `names`."""
        size = int(self._index.sizes[position])
        try:
            data = os.pread(self._open(), size, int(self._index.offsets[position]))
        except OSError as error:
            name = self.names[position]
            raise CorruptImageError(f"{self.path}: cannot read {name}: {error.strerror}") from error
        if len(data) != size:
            raise DataError(f"{self.path} became shorter while it was in use")
        return data

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptor": None, "_owner": None}

    def _open(self) -> int:
        """Returns this process's own descriptor, opening it at the first read."""
        if self._descriptor is not None and self._owner == os.getpid():
            return self._descriptor
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(f"cannot open {self.path}: {error.strerror}") from error
        weakref.finalize(self, os.close, descriptor)
        # A worker started later opens by name: the file there may be another one by now.
        if signature_of(os.fstat(descriptor)) != self._index.signature:
            raise DataError(f"{self.path} changed while it was in use: start again")
        self._descriptor, self._owner = descriptor, os.getpid()
        return descriptor


def _scan_tar(path: Path) -> dict[str, tuple[int, int]]:
    """Visits every header of a tar once.

    Raises:
        DataError: The file is compressed, truncated, damaged or not a tar.
    """
    try:
        with path.open("rb") as file:
            _reject_compressed(file, path)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                members = _collect(tar, path)
                end = tar.offset
            # tarfile takes a damaged or half header for the end. A whole archive ends with zeros.
            file.seek(end)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise DataError(f"{path} is truncated or damaged at byte {end}")
    except tarfile.TarError as error:
        raise DataError(f"{path} is truncated, damaged or not a tar archive: {error}") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    return members


def _collect(tar: tarfile.TarFile, path: Path) -> dict[str, tuple[int, int]]:
    members: dict[str, tuple[int, int]] = {}
    left_out = 0
    while (member := tar.next()) is not None:
        name = posixpath.normpath(member.name)
        if member.issparse():
            raise DataError(f"{path}: {name} is stored in pieces: write the tar without --sparse")
        if member.isreg():
            members[name] = (member.offset_data, member.size)
        elif member.islnk():
            target = posixpath.normpath(member.linkname)
            if target not in members:
                raise DataError(f"{path}: {name} links to {target}, which is not in the archive")
            members[name] = members[target]
        elif member.issym():
            left_out += 1
        # tarfile remembers every member it has seen: gigabytes for a million of them.
        tar.members.clear()
    if left_out:
        logger.warning("%s: %d symbolic links left out", path, left_out)
    return members


def _reject_compressed(file: BinaryIO, path: Path) -> None:
    head = file.read(8)
    file.seek(0)
    for magic, kind in _COMPRESSED.items():
        if head.startswith(magic):
            raise DataError(f"{path} is compressed ({kind}); it is read in place: decompress it")
