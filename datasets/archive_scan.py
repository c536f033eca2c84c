"""Search for the members of a tar or a zip, and for content that cannot be read in place.

In place means without unpacking. A tar is read header by header; a zip has a directory at its end.
If several members have the same name, the last one is used, as with `tar -x` and `unzip`.
Directories and symbolic links are left out.
"""

import logging
import posixpath
import stat
import tarfile
import zipfile
from pathlib import Path
from typing import BinaryIO

from datasets.errors import DataError

__all__ = ["ZIP_HEADER_SIZE", "Members", "scan_tar", "scan_zip"]

logger = logging.getLogger(__name__)

# Size in bytes of a zip member's local header up to the member name.
ZIP_HEADER_SIZE = 30

Members = dict[str, tuple[int, int]]

_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
_ENCRYPTED = 0x1


def scan_tar(path: Path) -> Members:
    """Read every header of a tar.

    Args:
        path: Path of the tar.

    Returns:
        Offset and size of the content of each member, in bytes, by member name.

    Raises:
        DataError: The file is compressed, truncated, damaged or not a tar, or a member is sparse.
    """
    try:
        with path.open("rb") as file:
            _reject_compressed(file, path)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                members = _collect_tar(tar, path)
                end = tar.offset
            # tarfile stops silently at a damaged or partial header. A complete archive has a block
            # of zeros there.
            file.seek(end)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise DataError(f"{path} is truncated or damaged at byte {end}")
    # tarfile converts the fields of extended headers without a check.
    except (tarfile.TarError, ValueError) as error:
        raise DataError(f"{path} is truncated, damaged or not a tar archive: {error}") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    return members


def scan_zip(path: Path) -> Members:
    """Read the directory of a zip.

    The local headers of the members are not read: for COCO on a network disk this takes minutes.

    Args:
        path: Path of the zip.

    Returns:
        Offset of the local header and compressed size of each member, in bytes, by member name.

    Raises:
        DataError: The file is truncated, damaged or not a zip, or a member is encrypted or
            compressed with a method other than deflate.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _collect_zip(archive, path)
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is truncated, damaged or not a zip archive: {error}") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def _collect_tar(tar: tarfile.TarFile, path: Path) -> Members:
    """Collect the members of an open tar."""
    members: Members = {}
    links = 0
    while (member := tar.next()) is not None:
        name = posixpath.normpath(member.name)
        if member.issparse():
            raise DataError(f"{path}: {name} is a sparse file: write the tar without --sparse")
        if member.isreg():
            members[name] = (member.offset_data, member.size)
        elif member.islnk():
            target = posixpath.normpath(member.linkname)
            if target not in members:
                raise DataError(f"{path}: {name} links to {target}, which is not in the archive")
            members[name] = members[target]
        elif member.issym():
            links += 1
        # tarfile keeps every member in memory, which is gigabytes for a million members.
        tar.members.clear()
    _warn_links(links, path)
    return members


def _collect_zip(archive: zipfile.ZipFile, path: Path) -> Members:
    """Collect the members of an open zip."""
    members: Members = {}
    links = 0
    # Every member must end before the directory starts; otherwise the file is damaged.
    end = archive.start_dir
    for member in archive.infolist():
        if member.is_dir():
            continue
        if stat.S_ISLNK(member.external_attr >> 16):
            links += 1
            continue
        name = posixpath.normpath(member.filename)
        if member.flag_bits & _ENCRYPTED:
            raise DataError(f"{path}: {name} is encrypted: write the zip without a password")
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            kind = zipfile.compressor_names.get(member.compress_type, member.compress_type)
            raise DataError(
                f"{path}: {name} is compressed with {kind}, which is not supported: "
                "use store or deflate"
            )
        start = member.header_offset
        if not 0 <= start <= end - ZIP_HEADER_SIZE - member.compress_size:
            raise DataError(f"{path} is damaged: {name} is outside the file")
        members[name] = (start, member.compress_size)
    _warn_links(links, path)
    return members


def _warn_links(count: int, path: Path) -> None:
    """Log the number of symbolic links that were left out."""
    if count:
        logger.warning("%s: %d symbolic links left out", path, count)


def _reject_compressed(file: BinaryIO, path: Path) -> None:
    """Raise `DataError` for a compressed file."""
    head = file.read(8)
    file.seek(0)
    for magic, kind in _COMPRESSED.items():
        if head.startswith(magic):
            raise DataError(
                f"{path} is compressed ({kind}), but a tar is read in place: decompress it"
            )
