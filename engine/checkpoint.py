"""Writing checkpoints: whole or not at all, the last, the best and the newest few.

A file is written under a temporary name beside its place, forced to the disk and then renamed over
it, so that whatever kills the run leaves the old file or the new one, never half of one. Reading is
`irpe_core.checkpoint.load_checkpoint`, which knows the originals' files too.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from engine.errors import UserError

LAST = "checkpoint.pth"
BEST = "best_checkpoint.pth"
NUMBERED = "checkpoint_{:04d}.pth"


def atomic_save(obj: Any, path: str | os.PathLike[str]) -> None:
    """Saves with `torch.save` such that `path` holds either its old content or all of the new.

    Raises:
        UserError: the file cannot be written, a full disk for example.
    """
    with replacing(Path(path)) as temporary:
        _write(obj, temporary)


def check_writable(directory: str | os.PathLike[str]) -> Path:
    """Makes the directory and tries to write in it, before any training time is spent.

    Returns:
        The directory as a path.

    Raises:
        UserError: it cannot be made or written.
    """
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b"x")
    except OSError as error:
        raise UserError(f"cannot write to {directory}: {error.strerror or error}") from error
    return directory


class CheckpointDir:
    """The checkpoints of one run: `checkpoint.pth` (last), `best_checkpoint.pth`, numbered ones.

    Only the main process may save. Beside the last and the best, the `keep` newest
    `checkpoint_0007.pth` remain. A state is serialised once; the file's other names are hard links,
    or copies where the file system has none.

    Args:
        output_dir: an existing directory.
        keep: number of numbered checkpoints to keep; 0 writes none.

    Raises:
        ValueError: `keep` is negative.
    """

    def __init__(self, output_dir: str | os.PathLike[str], keep: int = 0) -> None:
        if keep < 0:
            raise ValueError(f"keep is {keep} but should be 0 or more")
        self._dir = Path(output_dir)
        self._keep = keep

    def save(
        self, state: Mapping[str, Any], *, is_best: bool = False, epoch: int | None = None
    ) -> Path:
        """Writes `checkpoint.pth`, and its other names.

        Args:
            state: what to save.
            is_best: whether this is the best so far.
            epoch: number of the epoch that is finished; None in mid-epoch, where no numbered
                checkpoint is written.

        Returns:
            The path of `checkpoint.pth`.

        Raises:
            UserError: a file cannot be written.
        """
        last = self._dir / LAST
        with replacing(last) as temporary:
            _write(state, temporary)
            # The other names come first: a crash before the last one is renamed repeats the epoch
            # and writes them again, whereas a state that calls itself the best would not.
            if is_best:
                _alias(temporary, self._dir / BEST)
            if epoch is not None and self._keep > 0:
                _alias(temporary, self._dir / NUMBERED.format(epoch))
                for old in self.numbered()[: -self._keep]:
                    old.unlink(missing_ok=True)
        return last

    def latest(self) -> Path | None:
        """The last checkpoint, to resume from; None before the first."""
        last = self._dir / LAST
        return last if last.is_file() else None

    def numbered(self) -> list[Path]:
        """The numbered checkpoints, oldest first by the time they were written."""
        paths = self._dir.glob("checkpoint_[0-9]*.pth")
        return sorted(paths, key=lambda path: (path.stat().st_mtime_ns, path.name))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, which then takes its place in one move.

    Whatever is raised inside leaves `path` as it was.

    Raises:
        UserError: the file cannot be written, a full disk for example.
    """
    # A fixed name: what a crash leaves behind is overwritten by the next save.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        temporary.replace(path)
        _sync_directory(path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _write(obj: Any, path: Path) -> None:
    with path.open("wb") as file:
        try:
            torch.save(obj, file)
        except RuntimeError as error:
            # Of a full disk torch only says that its archive is incomplete.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise
        file.flush()
        os.fsync(file.fileno())


def _alias(source: Path, target: Path) -> None:
    """Gives a file a second name, atomically."""
    with replacing(target) as temporary:
        temporary.unlink(missing_ok=True)
        try:
            temporary.hardlink_to(source)
        except OSError:  # no hard links here; should the copy fail too, that error counts
            shutil.copyfile(source, temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())


def _sync_directory(directory: Path) -> None:
    """Forces the renaming itself to the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
