"""Checkpoints of the zoo in the torch hub cache, which `--pretrained` of the trainers reads too."""

import shutil
import tempfile
from pathlib import Path

from irpe_core import CheckpointError
from irpe_core.download import cache_path, download, record, sha256_of
from scripts.zoo.rows import Row

__all__ = ["cached", "fetch"]


def cached(row: Row) -> Path | None:
    """Return the path of a row's checkpoint in the cache, or None if it is not there."""
    path = _cache_path(row)
    return path if path.is_file() else None


def fetch(row: Row, mirror: str | None = None) -> Path:
    """Download or copy a row's checkpoint into the cache, unless it is there.

    Args:
        row: A row with a checkpoint.
        mirror: Folder, or URL of a folder, to use instead of the published URL.

    Returns:
        The path in the cache.

    Raises:
        CheckpointError: The checkpoint is not available, or its SHA-256 differs. The cache then
            has no file of its name.
    """
    target = _cache_path(row)
    if mirror is None or target.is_file():
        return download(row.checkpoint, sha256=row.sha256)
    if mirror.startswith(("http://", "https://")):
        url = f"{mirror.rstrip('/')}/{target.name}"
        return download(row.checkpoint, sha256=row.sha256, mirror=url)
    source = Path(mirror) / target.name
    if not source.is_file():
        raise CheckpointError(f"checkpoint {str(source)!r} does not exist")
    try:
        if row.sha256 and (found := sha256_of(source)) != row.sha256.lower():
            raise CheckpointError(
                f"SHA-256 of {str(source)!r} must be {row.sha256.lower()}, got {found}"
            )
        _copy(source, target)
        record(target, row.checkpoint, target)
    except OSError as error:
        raise CheckpointError(
            f"cannot copy {source} to {target}: {error.strerror or error}"
        ) from error
    return target


def _cache_path(row: Row) -> Path:
    """Return the path that the torch hub cache has for a row's checkpoint."""
    return cache_path(row.checkpoint)


def _copy(source: Path, target: Path) -> None:
    """Copy a file atomically, also while another process copies the same file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        copy = Path(folder) / target.name
        shutil.copyfile(source, copy)
        copy.replace(target)
