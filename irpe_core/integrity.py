"""The check of a checkpoint file before and after it is read: damage, sizes, and plain tensors.

`torch.save` writes a zip with a CRC-32 of each member, which `torch.load` does not compare. It also
allocates what the file claims: a compressed member may be a thousand times larger than the file,
and a small storage may stand for a tensor of any shape.
"""

import reprlib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from irpe_core.errors import CheckpointError

__all__ = ["check_archive", "check_tensors"]

_ZIP_MAGIC = b"PK\x03\x04"
_CHUNK = 1 << 20  # bytes
# A checkpoint is not compressed, and its tensors share memory at most in part.
_EXPANSION = 10


def check_archive(path: Path) -> None:
    """Compare the sizes and checksums in the file of a checkpoint; other formats have none.

    Args:
        path: An existing file.

    Raises:
        CheckpointError: The file is damaged or truncated, or would unpack to far more than its
            size.
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        if file.read(len(_ZIP_MAGIC)) != _ZIP_MAGIC:
            return
        try:
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
                _check_size(path, sum(member.file_size for member in members))
                for member in members:
                    # torch writes 0 if its checksums are switched off.
                    if member.CRC != 0:
                        _read(archive, member)
        except (CheckpointError, PermissionError):
            raise
        # For a damaged file zipfile may raise almost any exception, such as struct.error.
        except Exception as error:
            reason = "is truncated or not a torch checkpoint"
            if "CRC-32" in str(error):
                reason = "is damaged: a checksum in it is wrong"
            raise CheckpointError(f"{str(path)!r} {reason}") from error


def _read(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """Read a member to its end, where zipfile compares the checksum."""
    with archive.open(member) as content:
        while content.read(_CHUNK):
            pass


def check_tensors(content: Any, path: Path) -> None:
    """Check that all tensors in a checkpoint are plain and not much larger than its file.

    Args:
        content: Content of the file.
        path: The file.

    Raises:
        CheckpointError: A tensor is sparse, quantized or without data, or the tensors together are
            far larger than the file.
    """
    total = 0
    for key, tensor in _tensors(content):
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
        if not plain or tensor.is_quantized or tensor.is_nested or tensor.device.type != "cpu":
            raise CheckpointError(f"{key} of {str(path)!r} must be a plain dense tensor")
        total += tensor.numel() * tensor.element_size()
    _check_size(path, total)


def _check_size(path: Path, total: int) -> None:
    """Raise CheckpointError if the content of a file is far larger than the file."""
    size = path.stat().st_size
    if total > _EXPANSION * size + _CHUNK:
        raise CheckpointError(
            f"{str(path)!r} has {size:,} bytes but claims a content of {total:,} bytes: it is "
            "damaged or not a checkpoint"
        )


def _tensors(content: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors in nested dicts, lists and tuples, with the keys that lead to them."""
    # Without recursion, and each container once: an untrusted file may nest them in any way.
    pending: list[tuple[str, Any]] = [("", content)]
    seen: set[int] = set()
    while pending:
        key, value = pending.pop()
        if isinstance(value, Tensor):
            yield key or "the content", value
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            entries = value.items() if isinstance(value, dict) else enumerate(value)
            # Only the end of the keys, since the nesting may be deep.
            pending += [(f"{key}.{_short(name)}".lstrip(".")[-200:], one) for name, one in entries]


def _short(name: Any) -> str:
    """Return a key for a message; a foreign one may be of any size."""
    return name[:100] if isinstance(name, str) else reprlib.repr(name)
