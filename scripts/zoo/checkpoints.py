"""The zoo's checkpoints in the torch hub cache, where the trainers' `--pretrained` looks too."""

import shutil
import tempfile
from pathlib import Path

import torch

from irpe_core import CheckpointError
from irpe_core.download import download, sha256_of
from scripts.zoo.rows import Row, file_name

__all__ = ["cached", "fetch"]


def cached(row: Row) -> Path | None:
    """A row's checkpoint in the cache; None where it is not there."""
    path = _place(row)
    return path if path.is_file() else None


def fetch(row: Row, mirror: str | None = None) -> Path:
    """Bring a row's checkpoint into the cache, unless it is there.

    Args:
        row: With a checkpoint.
        mirror: A folder, or the address of one, that holds it in place of the published address.

    Returns:
        Its path in the cache.

    Raises:
        CheckpointError: It cannot be had, or has another checksum; nothing broken takes its name.
    """
    target = _place(row)
    if mirror is None or target.is_file():
        return download(row.checkpoint, sha256=row.sha256)
    if mirror.startswith(("http://", "https://")):
        return download(f"{mirror.rstrip('/')}/{target.name}", sha256=row.sha256)
    source = Path(mirror) / target.name
    if not source.is_file():
        raise CheckpointError(f"checkpoint {str(source)!r} does not exist")
    try:
        if row.sha256 and (found := sha256_of(source)) != row.sha256.lower():
            raise CheckpointError(
                f"{str(source)!r} has the SHA-256 {found} instead of {row.sha256}"
            )
        _copy(source, target)
    except OSError as error:
        raise CheckpointError(
            f"cannot copy {source} to {target}: {error.strerror or error}"
        ) from error
    return target


def _place(row: Row) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / file_name(row.checkpoint)


def _copy(source: Path, target: Path) -> None:
    """Whole or not at all, and not in the way of another process that copies the same file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        copy = Path(folder) / target.name
        shutil.copyfile(source, copy)
        copy.replace(target)
