"""The check of a checkpoint file before and after it is read: damage, sizes, and plain tensors.

`torch.save` writes a zip with a CRC-32 of each member, which `torch.load` does not compare. It also
allocates what the file claims: a compressed member may be a thousand times larger than the file,
and a small storage may stand for a tensor of any shape.
"""

import os
import reprlib
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from irpe_core.errors import CheckpointError

__all__ = ["check_tensors", "checked_archive"]

_ZIP_MAGIC = b"PK\x03\x04"
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # ends with the lengths of the name and the extra field
_CHUNK = 1 << 20  # bytes
# A checkpoint is not compressed, and its tensors share memory at most in part.
_EXPANSION = 10


@contextmanager
def checked_archive(path: Path) -> Iterator[None]:
    """Compare the sizes and checksums in the file of a checkpoint; other formats have none.

    The sizes are checked before the body of the `with` statement. A thread compares the checksums
    while the body reads the file. An error that it finds replaces an error of the body.

    Args:
        path: An existing file.

    Raises:
        CheckpointError: The file is damaged or truncated, or would unpack to far more than its
            size.
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        members = _members(path) if file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC else []
        with ThreadPoolExecutor(1) as thread:
            check = thread.submit(_are_intact, path, file.fileno(), members)
            try:
                yield
            finally:
                if not check.result():
                    raise CheckpointError(f"{str(path)!r} is damaged: a checksum in it is wrong")


def _members(path: Path) -> list[zipfile.ZipInfo]:
    """Return the members of the file that have a checksum.

    Raises:
        CheckpointError: The file is truncated, or would unpack to far more than its size.
        OSError: The file cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except OSError:
        raise
    # For a damaged file zipfile may raise almost any exception, such as struct.error.
    except Exception as error:
        raise CheckpointError(f"{str(path)!r} is truncated or not a torch checkpoint") from error
    _check_size(path, sum(member.file_size for member in members))
    # torch writes 0 if its checksums are switched off.
    return [member for member in members if member.CRC != 0]


def _are_intact(path: Path, descriptor: int, members: Sequence[zipfile.ZipInfo]) -> bool:
    """Return whether the contents of all members have their checksums."""
    # One small buffer, since each new one costs more than its checksum.
    buffer = memoryview(bytearray(_CHUNK))
    return all(
        _is_intact(descriptor, member, buffer)
        if member.compress_type == zipfile.ZIP_STORED
        else _is_intact_compressed(path, member)
        for member in members
    )


def _is_intact(descriptor: int, member: zipfile.ZipInfo, buffer: memoryview) -> bool:
    """Return whether the content of a member that is not compressed has its checksum.

    zipfile would copy it twice and hold the interpreter's lock for most of the time.
    """
    header = os.pread(descriptor, _LOCAL_HEADER.size, member.header_offset)
    if len(header) < _LOCAL_HEADER.size:
        return False
    magic, *lengths = _LOCAL_HEADER.unpack(header)
    start = member.header_offset + _LOCAL_HEADER.size + sum(lengths)
    checksum = done = 0
    while done < member.file_size:
        size = os.preadv(descriptor, [buffer[: member.file_size - done]], start + done)
        if size == 0:
            return False
        checksum = zlib.crc32(buffer[:size], checksum)
        done += size
    return magic == _ZIP_MAGIC and checksum == member.CRC


def _is_intact_compressed(path: Path, member: zipfile.ZipInfo) -> bool:
    """Return whether a member can be unpacked to its end, where zipfile compares the checksum."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(member) as content:
            while content.read(_CHUNK):
                pass
    except OSError:
        raise
    # As in `_members`.
    except Exception:
        return False
    return True


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
