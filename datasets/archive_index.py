"""Where every member of an archive lies: built once, then opened in a moment.

Finding the members of a 150 GB tar means visiting every header in it. The result is kept as an
uncompressed `.npz` of flat arrays beside the archive, or in the user's cache where that folder
cannot be written, and is trusted as long as the archive's size and modification time stay what
they were. Any archive whose members lie in one piece can use it; `archives` does for tar.
"""

import bisect
import hashlib
import logging
import os
import uuid
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datasets.errors import DataError
from datasets.names import PackedNames

logger = logging.getLogger(__name__)

# Raise it whenever the meaning of the stored arrays changes: older files are then rebuilt.
_FORMAT = 1

Signature = tuple[int, int]


@dataclass(frozen=True)
class ArchiveIndex:
    """The members of one archive, sorted by name.

    Attributes:
        names: N member names, each once.
        offsets: (N,) int64, first byte of each member's content inside the archive.
        sizes: (N,) int64, bytes.
        signature: Size in bytes and modification time in ns of the archive described.
    """

    names: PackedNames
    offsets: np.ndarray
    sizes: np.ndarray
    signature: Signature

    @classmethod
    def from_members(
        cls, members: Mapping[str, tuple[int, int]], signature: Signature
    ) -> "ArchiveIndex":
        """Builds the index from name -> (offset, size)."""
        names = sorted(members)
        places = np.array([members[name] for name in names], dtype=np.int64).reshape(-1, 2)
        columns = np.ascontiguousarray(places.T)
        return cls(PackedNames.pack(names), columns[0], columns[1], signature)

    def find(self, name: str) -> int | None:
        """Returns the row of `name`, or None. Needs no dictionary: the names are sorted."""
        row = bisect.bisect_left(self.names, name)
        return row if row < len(self.names) and self.names[row] == name else None


def signature_of(status: os.stat_result) -> Signature:
    """What must stay the same for an index to be valid: size and modification time (ns)."""
    return status.st_size, status.st_mtime_ns


def open_index(path: Path, scan: Callable[[Path], Mapping[str, tuple[int, int]]]) -> ArchiveIndex:
    """Opens the index of the archive at `path`, building and storing it where there is none.

    Several processes may do so at once: each builds the same index, and each stores it atomically.

    Args:
        path: The archive.
        scan: Finds the members: path -> {name: (offset, size)}.

    Raises:
        DataError: There is no file at `path`, or `scan` says that it is damaged.
    """
    if not path.is_file():
        raise DataError(f"there is no archive at {path}")
    signature = signature_of(path.stat())
    places = _places(path)
    for place in places:
        index = _load(place, signature)
        if index is not None:
            return index

    logger.info("indexing %s: done once, the index is kept", path)
    index = ArchiveIndex.from_members(scan(path), signature)
    for place in places:
        try:
            save_index(index, place)
        except OSError as error:
            logger.debug("no index at %s: %s", place, error)
        else:
            return index
    logger.warning("the index of %s could not be stored: it is built at every start", path)
    return index


def save_index(index: ArchiveIndex, place: Path) -> None:
    """Stores an index, atomically: readers see the old file or the new one, never a part."""
    place.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile: its files can be read by their owner alone, and colleagues share the archive.
    temporary = place.with_name(f".{place.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            np.savez(
                file,
                format=np.int64(_FORMAT),
                signature=np.array(index.signature, dtype=np.int64),
                names=index.names.blob,
                offsets=index.offsets,
                sizes=index.sizes,
            )
        temporary.replace(place)
    finally:
        temporary.unlink(missing_ok=True)


def _places(path: Path) -> tuple[Path, Path]:
    """Where the index may lie, in order of preference: beside the archive, in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "irpe"
    digest = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]
    name = f"{path.name}.index.npz"
    return path.with_name(name), cache / f"{digest}-{name}"


def _load(place: Path, signature: Signature) -> ArchiveIndex | None:
    """Reads a stored index; None where there is none, it is of another archive, or damaged."""
    try:
        with np.load(place) as stored:
            if int(stored["format"]) != _FORMAT or tuple(stored["signature"]) != signature:
                return None
            names = PackedNames(stored["names"])
            return ArchiveIndex(names, stored["offsets"], stored["sizes"], signature)
    except FileNotFoundError:
        return None
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        logger.debug("the index at %s is ignored: %s", place, error)
        return None
