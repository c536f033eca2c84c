"""Reading of tar and zip members without unpacking, by any number of forked or spawned workers.

An archive object holds an index of its members (see `archive_index`) and one file descriptor per
process. It reads with `pread`, which has the offset as an argument. With `seek` and `read`, as in
`zipfile`, forked workers would share one file position and read each other's bytes.
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

__all__ = ["Archive", "TarArchive", "ZipArchive"]

_ZIP_MAGIC = b"PK\x03\x04"
# Far more than any image file has. A deflated member may unpack to a thousand times its size.
_LARGEST_MEMBER = 256 << 20  # bytes


class Archive(ABC):
    """Base class: read-only access to the members of one archive file.

    Member names are normalized (`./a/b.jpg` becomes `a/b.jpg`) and sorted. Directories and symbolic
    links are left out. If several members have the same name, the last one is used. A pickled
    archive has no file descriptor; it opens the file again at the first read.

    Args:
        path: Path of the archive.
        index: Names, offsets and sizes of the members.
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
        """Return the content of a member.

        Args:
            member: Name of the member.

        Raises:
            CorruptImageError: The member cannot be read or is damaged.
            DataError: There is no such member, or the archive changed since it was opened.
        """
        position = self._index.find(member)
        if position is None:
            raise DataError(f"{self.path} has no member {member!r}")
        return self.read_at(position)

    @abstractmethod
    def read_at(self, position: int) -> bytes:
        """Return the content of the member `names[position]`, as `read` does."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptor": None, "_owner": None}

    def _pread(self, size: int, offset: int, position: int) -> bytes:
        """Read `size` bytes at `offset`, which belong to the member `names[position]`."""
        if size > _LARGEST_MEMBER:
            raise self._damaged(position, f"it has more than {_LARGEST_MEMBER:,} bytes")
        try:
            data = os.pread(self._open(), size, offset)
        except OSError as error:
            name = self.names[position]
            raise CorruptImageError(f"{self.path}: cannot read {name}: {error.strerror}") from error
        if len(data) != size:
            raise DataError(f"{self.path} became shorter while it was in use")
        return data

    def _damaged(self, position: int, reason: str) -> CorruptImageError:
        """Build the error of the damaged member `names[position]`."""
        return CorruptImageError(f"{self.path}: {self.names[position]} is damaged: {reason}")

    def _open(self) -> int:
        """Return the file descriptor of this process; the first read opens it."""
        if self._descriptor is not None and self._owner == os.getpid():
            return self._descriptor
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(f"cannot open {self.path}: {error.strerror}") from error
        weakref.finalize(self, os.close, descriptor)
        # A worker that starts later opens the path again, which may be another file by then.
        if signature_of(os.fstat(descriptor)) != self._index.signature:
            raise DataError(f"{self.path} changed while it was in use: start the run again")
        self._descriptor, self._owner = descriptor, os.getpid()
        return descriptor


class TarArchive(Archive):
    """An uncompressed tar; a hard link has the content of its target.

    Args:
        path: Path of the tar.

    Raises:
        DataError: The archive is missing, compressed, truncated or not a tar.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        path = Path(path)
        super().__init__(path, open_index(path, scan_tar))

    def read_at(self, position: int) -> bytes:
        """Return the content of the member `names[position]`."""
        size = int(self._index.sizes[position])
        return self._pread(size, int(self._index.offsets[position]), position)


class ZipArchive(Archive):
    """A zip whose members are uncompressed, as in COCO's zips, or compressed with deflate.

    Checksums are not verified; a damaged image is detected when it is decoded.

    Args:
        path: Path of the zip.

    Raises:
        DataError: The archive is missing, truncated, encrypted, compressed with another method, or
            not a zip.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        path = Path(path)
        super().__init__(path, open_index(path, scan_zip))

    def read_at(self, position: int) -> bytes:
        """Return the decompressed content of the member `names[position]`."""
        offset = int(self._index.offsets[position])
        header = self._pread(ZIP_HEADER_SIZE, offset, position)
        method, name_size, extra_size = struct.unpack("<8xH16xHH", header)
        if not header.startswith(_ZIP_MAGIC):
            raise self._damaged(position, "its header is not at the offset in the directory")
        data = self._pread(
            int(self._index.sizes[position]),
            offset + ZIP_HEADER_SIZE + name_size + extra_size,
            position,
        )
        if method == zipfile.ZIP_STORED:
            return data
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            content = inflater.decompress(data, _LARGEST_MEMBER + 1)
        except zlib.error as error:
            raise self._damaged(position, str(error)) from error
        if len(content) > _LARGEST_MEMBER:
            raise self._damaged(position, f"it unpacks to more than {_LARGEST_MEMBER:,} bytes")
        if not inflater.eof:
            raise self._damaged(position, "incomplete or truncated stream")
        return content
