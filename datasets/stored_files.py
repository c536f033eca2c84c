"""Small files that belong to a data set: where they are stored, and how they are written."""

import contextlib
import hashlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

__all__ = ["storage_paths", "write_atomically"]


def storage_paths(source: Path, folder: Path, name: str) -> tuple[Path, Path]:
    """Return the possible paths of a file: in a folder of the data, then in the user's cache.

    The second is for folders that cannot be written. Its name depends on the path of the source.

    Args:
        source: The data that the file belongs to.
        folder: Folder to store the file in.
        name: Name of the file.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "irpe"
    digest = hashlib.sha256(os.fsencode(source.resolve())).hexdigest()[:16]
    return folder / name, cache / f"{digest}-{name}"


@contextlib.contextmanager
def write_atomically(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing: a reader gets the old file or the new one, never a part.

    Args:
        path: File to write; its folder is created.

    Raises:
        OSError: The file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Files of the module tempfile are readable by their owner only. Other users of a shared data
    # set must be able to read this one.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            yield file
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
