"""Checkpoints, written atomically: the last, the best and the newest numbered ones.

A file is written under a temporary name in the same folder, synced to the disk and then renamed.
After a crash the path therefore has either the old file or the complete new one.
`irpe_core.checkpoint.load_checkpoint` reads checkpoints.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from engine.errors import UserError

__all__ = ["CheckpointDir", "atomic_save", "check_writable", "replacing"]

_LAST = "checkpoint.pth"
_BEST = "best_checkpoint.pth"
_NUMBERED = "checkpoint_{:04d}.pth"
_NUMBER = re.compile(r"checkpoint_([0-9]{4,18})\.pth")


def atomic_save(obj: Any, path: str | os.PathLike[str]) -> None:
    """Save an object with `torch.save`, atomically.

    Raises:
        UserError: The file cannot be written, for example because the disk is full.
    """
    with replacing(Path(path)) as temporary:
        _write(obj, temporary)


def check_writable(folder: str | os.PathLike[str]) -> Path:
    """Create a folder if it is missing, and write to it to find errors before training.

    Returns:
        The folder as a path.

    Raises:
        UserError: The folder cannot be created or written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from error
    return folder


class CheckpointDir:
    """The checkpoints of one run: last, best and numbered by epoch.

    `checkpoint.pth` is the last one and `best_checkpoint.pth` the best one. In addition, the `keep`
    newest numbered ones of the run, such as `checkpoint_0007.pth`, are kept. No other file is
    deleted, whatever its name. Only the main process may save.
    A state is serialized once; its other names are hard links, or copies where the file system has
    no hard links.

    Args:
        output_dir: Existing folder.
        keep: Number of numbered checkpoints to keep; 0 writes none.
        first_epoch: Epoch at which the run continues; numbered checkpoints of earlier epochs belong
            to the run. 0 for a new run.

    Raises:
        ValueError: `keep` is negative.
    """

    def __init__(
        self, output_dir: str | os.PathLike[str], keep: int = 0, *, first_epoch: int = 0
    ) -> None:
        if keep < 0:
            raise ValueError(f"keep must be at least 0, got {keep}")
        self._dir = Path(output_dir)
        self._keep = keep
        self._epochs = {epoch for epoch in self.numbered() if epoch < first_epoch}

    def save(
        self, state: Mapping[str, Any], *, is_best: bool = False, epoch: int | None = None
    ) -> Path:
        """Write `checkpoint.pth` and its other names.

        Args:
            state: Content of the checkpoint.
            is_best: Whether this is the best checkpoint so far.
            epoch: Number of the finished epoch; None within an epoch, when no numbered checkpoint
                is written.

        Returns:
            The path of `checkpoint.pth`.

        Raises:
            UserError: A file cannot be written.
        """
        last = self._dir / _LAST
        with replacing(last) as temporary:
            _write(state, temporary)
            # Rename `checkpoint.pth` last. After a crash before that, the resumed run repeats the
            # epoch and writes the other names again. In the other order, it would resume after the
            # epoch and never write its best checkpoint.
            if is_best:
                _link_or_copy(temporary, self._dir / _BEST)
            if epoch is not None and self._keep > 0:
                _link_or_copy(temporary, self._dir / _NUMBERED.format(epoch))
                self._epochs.add(epoch)
                for old in sorted(self._epochs)[: -self._keep]:
                    (self._dir / _NUMBERED.format(old)).unlink(missing_ok=True)
                    self._epochs.remove(old)
        return last

    def latest(self) -> Path | None:
        """Return the path of the last checkpoint, or None if there is none."""
        last = self._dir / _LAST
        return last if last.is_file() else None

    def is_used(self) -> bool:
        """Return whether the folder has checkpoints of a run."""
        return any((self._dir / name).exists() for name in (_LAST, _BEST)) or bool(self.numbered())

    def numbered(self) -> list[int]:
        """Return the epochs that have a numbered checkpoint in the folder, in ascending order."""
        found = (_NUMBER.fullmatch(path.name) for path in self._dir.glob("checkpoint_*.pth"))
        epochs = (int(match[1]) for match in found if match)
        # `checkpoint_00007.pth` is not a name of this class.
        return sorted(n for n in epochs if (self._dir / _NUMBERED.format(n)).exists())


@contextmanager
def replacing(path: Path, *, suffix: str = ".tmp") -> Iterator[Path]:
    """Yield a temporary path in the same folder, and rename it to `path` at the end.

    After an exception `path` is unchanged.

    Args:
        path: Path of the file.
        suffix: Suffix of the temporary path, for libraries that select a format by it.

    Raises:
        UserError: The file cannot be written, for example because the disk is full.
    """
    # The temporary name is fixed, so the next save overwrites what a crash has left.
    temporary = path.with_name(f".{path.name}.tmp{suffix.removesuffix('.tmp')}")
    try:
        yield temporary
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _write(obj: Any, path: Path) -> None:
    """Save an object with `torch.save` and sync the file to the disk."""
    with path.open("wb") as file:
        try:
            torch.save(obj, file)
        except RuntimeError as error:
            # torch hides the OSError of a full disk behind an error about its archive.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise
        file.flush()
        os.fsync(file.fileno())


def _link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, atomically."""
    with replacing(target) as temporary:
        temporary.unlink(missing_ok=True)
        try:
            temporary.hardlink_to(source)
        except OSError:  # The file system has no hard links.
            shutil.copyfile(source, temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Sync a folder to the disk, so that a renaming in it is not lost."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
