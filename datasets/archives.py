"""Members of a tar or a zip, read in place by any number of forked or spawned workers.

An archive object holds an index (see `archive_index`) and, per process, one descriptor. Reads go
through `pread`, which takes its own offset: processes that share a descriptor's file position
after a fork, as with `seek` and `read` (and with `zipfile`), get each other's bytes.
"""

import os
import struct
import weakref
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets.archive_index import ArchiveIndex, open_index, signature_of
from datasets.archive_scan import ZIP_HEADER_SIZE, scan_tar, scan_zip
from datasets.errors import CorruptImageError, DataError

_ZIP_MAGIC = b"PK\x03\x04"


class Archive(ABC):
    """Base: a read-only mapping from member name to content, over one file.

    Names are normalized (`./a/b.jpg` is `a/b.jpg`) and sorted. Directories and symbolic links are
    left out, and of several members with one name the last counts. Pickles without its descriptor.

    Args:
        path: The archive.
        index: Where its members lie.
    """

    def __init__(self, path: Path, index: ArchiveIndex) -> None:
        self.path = path
        self._index = index
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
            CorruptImageError: The member cannot be read.
            DataError: There is no such member, or the archive changed since it was opened.
        """
        position = self._index.find(member)
        if position is None:
            raise DataError(f"{self.path} has no member {member!r}")
        return self.read_at(position)

    @abstractmethod
    def read_at(self, position: int) -> bytes:
        """Returns the content of the member at `position` of `names`."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptor": None, "_owner": None}

    def _pread(self, size: int, offset: int, position: int) -> bytes:
        """Reads `size` bytes of the archive for the member at `position`."""
        try:
            data = os.pread(self._open(), size, offset)
        except OSError as error:
            name = self.names[position]
            raise CorruptImageError(f"{self.path}: cannot read {name}: {error.strerror}") from error
        if len(data) != size:
            raise DataError(f"{self.path} became shorter while it was in use")
        return data

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


class TarArchive(Archive):
    """An uncompressed tar; hard links give the content they link to.

    Args:
        path: The archive.

    Raises:
        DataError: The archive is missing, compressed, truncated or not a tar.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        path = Path(path)
        super().__init__(path, open_index(path, scan_tar))

    def read_at(self, position: int) -> bytes:
        """Returns the content of the member at `position` of `names`."""
        size = int(self._index.sizes[position])
        return self._pread(size, int(self._index.offsets[position]), position)


class ZipArchive(Archive):
    """A zip whose members are stored as they are, as COCO's, or packed by deflate.

    Checksums are not compared: a damaged image shows when it is decoded.

    Args:
        path: The archive.

    Raises:
        DataError: The archive is missing, truncated, encrypted, packed otherwise, or not a zip.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        path = Path(path)
        super().__init__(path, open_index(path, scan_zip))

    def read_at(self, position: int) -> bytes:
        """Returns the content of the member at `position` of `names`, unpacked."""
        offset = int(self._index.offsets[position])
        header = self._pread(ZIP_HEADER_SIZE, offset, position)
        method, name_size, extra_size = struct.unpack("<8xH16xHH", header)
        if not header.startswith(_ZIP_MAGIC):
            raise self._damaged(position, "its header is not where the directory says")
        data = self._pread(
            int(self._index.sizes[position]),
            offset + ZIP_HEADER_SIZE + name_size + extra_size,
            position,
        )
        if method == zipfile.ZIP_STORED:
            return data
        try:
            return zlib.decompress(data, -zlib.MAX_WBITS)
        except zlib.error as error:
            raise self._damaged(position, str(error)) from error

    def _damaged(self, position: int, reason: str) -> CorruptImageError:
        return CorruptImageError(f"{self.path}: {self.names[position]} is damaged: {reason}")
