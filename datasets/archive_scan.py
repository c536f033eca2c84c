"""Finding the members of a tar or a zip, and refusing what cannot be read in place.

A tar is visited header by header; a zip has a directory at its end. Of several members with one
name the last counts, as with `tar -x` and `unzip`. Directories and symbolic links are left out.
"""

import logging
import posixpath
import stat
import tarfile
import zipfile
from pathlib import Path
from typing import BinaryIO

from datasets.errors import DataError

logger = logging.getLogger(__name__)

# Bytes of a zip member's local header before its name.
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
    """Visits every header of a tar once: name -> (first byte of the content, bytes).

    Raises:
        DataError: The file is compressed, truncated, damaged or not a tar.
    """
    try:
        with path.open("rb") as file:
            _reject_compressed(file, path)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                members = _collect_tar(tar, path)
                end = tar.offset
            # tarfile takes a damaged or half header for the end. A whole archive ends with zeros.
            file.seek(end)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise DataError(f"{path} is truncated or damaged at byte {end}")
    except tarfile.TarError as error:
        raise DataError(f"{path} is truncated, damaged or not a tar archive: {error}") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    return members


def scan_zip(path: Path) -> Members:
    """Reads a zip's directory: name -> (first byte of the local header, bytes as stored).

    The local headers are not visited: on a network disk that takes minutes for COCO.

    Raises:
        DataError: The file is truncated, damaged or not a zip, or a member is encrypted or packed
            by a method other than deflate.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _collect_zip(archive, path)
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is truncated, damaged or not a zip archive: {error}") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def _collect_tar(tar: tarfile.TarFile, path: Path) -> Members:
    members: Members = {}
    left_out = 0
    while (member := tar.next()) is not None:
        name = posixpath.normpath(member.name)
        if member.issparse():
            raise DataError(f"{path}: {name} is stored in pieces: write the tar without --sparse")
        if member.isreg():
            members[name] = (member.offset_data, member.size)
        elif member.islnk():
            target = posixpath.normpath(member.linkname)
            if target not in members:
                raise DataError(f"{path}: {name} links to {target}, which is not in the archive")
            members[name] = members[target]
        elif member.issym():
            left_out += 1
        # tarfile remembers every member it has seen: gigabytes for a million of them.
        tar.members.clear()
    _tell_left_out(left_out, path)
    return members


def _collect_zip(archive: zipfile.ZipFile, path: Path) -> Members:
    members: Members = {}
    left_out = 0
    # A directory that names bytes behind itself belongs to another, or a damaged, file.
    end = archive.start_dir
    for member in archive.infolist():
        if member.is_dir():
            continue
        if stat.S_ISLNK(member.external_attr >> 16):
            left_out += 1
            continue
        name = posixpath.normpath(member.filename)
        if member.flag_bits & _ENCRYPTED:
            raise DataError(f"{path}: {name} is encrypted: write the zip without a password")
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            kind = zipfile.compressor_names.get(member.compress_type, member.compress_type)
            raise DataError(f"{path}: {name} is packed by {kind}: only store and deflate are read")
        start = member.header_offset
        if not 0 <= start <= end - ZIP_HEADER_SIZE - member.compress_size:
            raise DataError(f"{path} is damaged: {name} does not lie inside the file")
        members[name] = (start, member.compress_size)
    _tell_left_out(left_out, path)
    return members


def _tell_left_out(count: int, path: Path) -> None:
    if count:
        logger.warning("%s: %d symbolic links left out", path, count)


def _reject_compressed(file: BinaryIO, path: Path) -> None:
    head = file.read(8)
    file.seek(0)
    for magic, kind in _COMPRESSED.items():
        if head.startswith(magic):
            raise DataError(f"{path} is compressed ({kind}); it is read in place: decompress it")
