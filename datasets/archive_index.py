"""An index of the members of an archive: names, offsets and sizes, built once and stored.

To find the members of a 150 GB tar, every header in it must be read. The result is stored as an
uncompressed `.npz` of flat arrays next to the archive, or in the user's cache if that folder cannot
be written. A stored index is valid while size and modification time of the archive stay the same.
The index works for every archive whose members are contiguous, such as tar and zip.
"""

import bisect
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datasets.errors import DataError
from datasets.packed_strings import PackedStrings
from datasets.stored_files import storage_paths, write_atomically

__all__ = ["Signature", "ArchiveIndex", "signature_of", "open_index", "save_index"]

logger = logging.getLogger(__name__)

# Increase this number when the meaning of the stored arrays changes. Older files are then rebuilt.
_FORMAT = 1

Signature = tuple[int, int]


@dataclass(frozen=True)
class ArchiveIndex:
    """The members of one archive, sorted by name.

    Attributes:
        names: Names of the N members, without duplicates.
        offsets: Offset of each member in the archive in bytes, (N,) int64. A tar index has the
            offset of the content, a zip index that of the member's header.
        sizes: Size of each member as stored in the archive, in bytes, (N,) int64.
        signature: Size in bytes and modification time in ns of the archive.
    """

    names: PackedStrings
    offsets: np.ndarray
    sizes: np.ndarray
    signature: Signature

    @classmethod
    def from_members(
        cls, members: Mapping[str, tuple[int, int]], signature: Signature
    ) -> "ArchiveIndex":
        """Build the index from a mapping of name to (offset, size)."""
        names = sorted(members)
        places = np.array([members[name] for name in names], dtype=np.int64).reshape(-1, 2)
        columns = np.ascontiguousarray(places.T)
        return cls(PackedStrings.pack(names), columns[0], columns[1], signature)

    def find(self, name: str) -> int | None:
        """Return the position of `name` by binary search, or None if there is no such member."""
        position = bisect.bisect_left(self.names, name)
        found = position < len(self.names) and self.names[position] == name
        return position if found else None


def signature_of(status: os.stat_result) -> Signature:
    """Return size in bytes and modification time in ns; an index is valid while both are equal."""
    return status.st_size, status.st_mtime_ns


def open_index(path: Path, scan: Callable[[Path], Mapping[str, tuple[int, int]]]) -> ArchiveIndex:
    """Open the index of an archive; build and store it if there is no valid one.

    Several processes may call this at the same time. Each builds the same index and stores it
    atomically.

    Args:
        path: Path of the archive.
        scan: Function from the path to {name: (offset, size)} of the members.

    Raises:
        DataError: There is no file at `path`, or `scan` finds damage.
    """
    if not path.is_file():
        raise DataError(f"there is no archive at {path}")
    signature = signature_of(path.stat())
    index_paths = storage_paths(path, path.parent, f"{path.name}.index.npz")
    for index_path in index_paths:
        index = _load(index_path, signature)
        if index is not None:
            return index

    logger.info("indexing %s: this is done once, the index is stored", path)
    try:
        index = ArchiveIndex.from_members(scan(path), signature)
    except ValueError as error:
        raise DataError(f"{path} is damaged: {error}") from error
    for index_path in index_paths:
        try:
            save_index(index, index_path)
        except OSError as error:
            logger.debug("cannot store the index at %s: %s", index_path, error)
        else:
            return index
    logger.warning("the index of %s could not be stored: it is built again at every start", path)
    return index


def save_index(index: ArchiveIndex, index_path: Path) -> None:
    """Store an index atomically: a reader gets the old file or the new one, never a part.

    Args:
        index: Index to store.
        index_path: File to write.

    Raises:
        OSError: The file cannot be written.
    """
    with write_atomically(index_path) as file:
        np.savez(
            file,
            format=np.int64(_FORMAT),
            signature=np.array(index.signature, dtype=np.int64),
            names=index.names.blob,
            offsets=index.offsets,
            sizes=index.sizes,
        )


def _load(index_path: Path, signature: Signature) -> ArchiveIndex | None:
    """Read a stored index; None if it is missing, outdated or damaged."""
    if not index_path.is_file():
        return None
    try:
        with np.load(index_path) as stored:
            if int(stored["format"]) != _FORMAT or tuple(stored["signature"]) != signature:
                return None
            index = ArchiveIndex(
                PackedStrings(stored["names"]), stored["offsets"], stored["sizes"], signature
            )
        _check(index)
    except Exception as error:  # The file may have any content.
        logger.debug("the index at %s is ignored: %s", index_path, error)
        return None
    return index


def _check(index: ArchiveIndex) -> None:
    """Raise ValueError if the arrays do not fit each other or the size of the archive."""
    shape = (len(index.names),)
    for array in (index.offsets, index.sizes):
        if array.dtype != np.int64 or array.shape != shape:
            raise ValueError(f"its arrays must be int64 of shape {shape}")
    size, _ = index.signature
    if ((index.offsets < 0) | (index.sizes < 0) | (index.offsets > size - index.sizes)).any():
        raise ValueError("a member is outside the archive")
