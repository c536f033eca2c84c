"""Atomic writing of generated data: a folder appears complete or not at all."""

import tempfile
from collections.abc import Callable
from pathlib import Path

from datasets.errors import DataError

__all__ = ["write_once"]


def write_once(root: Path, name: str, note: tuple[str, str], fill: Callable[[Path], None]) -> Path:
    """Write a folder of generated data, unless it exists already.

    The data is written to a temporary folder first, which is then renamed to `root`. Several
    processes may call this at the same time.

    Args:
        root: Folder to write; it must be new, empty or written by an earlier call.
        name: Plural name of the data, for error messages.
        note: Name and content of a text file in the folder. A folder with exactly this file is
            complete and is not written again.
        fill: Function that writes all other files into a folder. For the same note it must write
            the same files.

    Returns:
        The absolute path of the folder.

    Raises:
        DataError: The folder has other content or cannot be written.
    """
    root = root.resolve()
    # Check for files before checking for the note. In the other order, another process could
    # finish in between, and its data would look like other files.
    occupied = root.exists() and (not root.is_dir() or any(root.iterdir()))
    if _is_written(root, note):
        return root
    if occupied:
        raise DataError(f"{root} holds other files: the {name} need a new or empty folder")
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as scratch:
            tree = Path(scratch) / "tree"
            tree.mkdir()
            fill(tree)
            (tree / note[0]).write_text(note[1])
            _move(tree, root, note)
    except OSError as error:
        raise DataError(f"cannot write the {name} to {root}: {error.strerror}") from error
    return root


def _move(tree: Path, root: Path, note: tuple[str, str]) -> None:
    """Rename `tree` to `root`, unless another process has written `root` already."""
    try:
        tree.rename(root)
    except OSError:
        # Another process was faster and has written the same data.
        if not _is_written(root, note):
            raise


def _is_written(root: Path, note: tuple[str, str]) -> bool:
    """Return whether a folder is complete: its note exists and has the expected content."""
    file = root / note[0]
    return file.is_file() and file.read_text() == note[1]
