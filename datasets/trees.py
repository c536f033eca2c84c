"""Folders of generated data that appear whole or not at all."""

import tempfile
from collections.abc import Callable
from pathlib import Path

from datasets.errors import DataError


def write_once(root: Path, what: str, note: tuple[str, str], fill: Callable[[Path], None]) -> Path:
    """Writes a folder beside its place and moves it there; several processes may do so at once.

    Args:
        root: A new or empty folder, or one that was written before.
        what: Name of the data, plural, for messages.
        note: Name and content of a text file that is written too. A folder with just this note
            is taken for written.
        fill: Writes all else into a folder; always the same for the same note.

    Returns:
        The folder.

    Raises:
        DataError: The folder holds something else or cannot be written.
    """
    root = root.resolve()
    # Occupied first, then whether by the data: another process may finish in between.
    occupied = root.exists() and (not root.is_dir() or any(root.iterdir()))
    if _is_written(root, note):
        return root
    if occupied:
        raise DataError(f"{root} holds other files: the {what} need a new or empty folder")
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as scratch:
            tree = Path(scratch) / "tree"
            tree.mkdir()
            fill(tree)
            (tree / note[0]).write_text(note[1])
            _move(tree, root, note)
    except OSError as error:
        raise DataError(f"cannot write the {what} to {root}: {error.strerror}") from error
    return root


def _move(tree: Path, root: Path, note: tuple[str, str]) -> None:
    try:
        tree.rename(root)
    except OSError:
        # Another process was first: its data are the same.
        if not _is_written(root, note):
            raise


def _is_written(root: Path, note: tuple[str, str]) -> bool:
    place = root / note[0]
    return place.is_file() and place.read_text() == note[1]
