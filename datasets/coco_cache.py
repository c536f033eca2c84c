"""The arrays of a large annotation file, stored once and then mapped into memory.

To parse COCO's training annotations takes half a minute and 4 GB in every process. The arrays of
`coco_annotations` are therefore stored as a zip of `.npy` files next to the annotation file, or in
the user's cache if that folder cannot be written. All processes of a machine map the same file, so
they share its memory.

A stored file is valid for one content of the annotation file (SHA-256), and for one choice of masks
and images. Its own content is compared with the CRC-32 of the zip format. A file that is not valid
is rebuilt: the annotation file is read again, with all its checks.
"""

import contextlib
import hashlib
import json
import logging
import os
import struct
import zipfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from datasets.coco_annotations import (
    CocoAnnotations,
    read_annotations,
    report_flat,
    report_unlisted,
)
from datasets.coco_json import report_placeholder
from datasets.packed_strings import PackedStrings
from datasets.stored_files import storage_paths, write_atomically

__all__ = ["open_annotations"]

logger = logging.getLogger(__name__)

# Increase this number when the meaning of the stored arrays changes. Older files are then rebuilt.
_FORMAT = 1
# Smaller annotation files are parsed in a fraction of a second.
_SMALLEST = 4 << 20  # bytes
_CHUNK = 1 << 20  # bytes
_ARRAYS = ("image_ids", "sizes", "starts", "boxes", "categories", "areas")
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip: magic, length of name, length of extra field


@dataclass(frozen=True, kw_only=True)
class _Mapped(CocoAnnotations):
    """Annotations in mapped memory, which spawned workers share by mapping the file again."""

    stored: Path
    key: str

    def __reduce__(self) -> tuple[Any, ...]:
        with contextlib.suppress(Exception):
            if _map(self.stored, self.key) is not None:
                return _map, (self.stored, self.key)
        # The file was deleted or replaced since: the worker gets a copy of the arrays.
        values = (getattr(self, field.name) for field in fields(CocoAnnotations))
        return CocoAnnotations, tuple(values)


def open_annotations(
    path: str | os.PathLike[str],
    *,
    with_masks: bool = False,
    only: Collection[str] | None = None,
) -> CocoAnnotations:
    """Return the result of `read_annotations`, for a large file from its stored arrays.

    Several processes may call this at the same time. One of them reads the annotation file and
    stores the arrays; the others of the same machine wait for it.

    Args:
        path: Path of the JSON file.
        with_masks: Keep the segmentations.
        only: File names of the images to keep; None for all.

    Raises:
        DataError: See `read_annotations`.
    """
    path = Path(path)
    try:
        source = path.open("rb")
    except OSError:
        return read_annotations(path, with_masks=with_masks, only=only)  # It reports the error.
    with source:
        status = os.fstat(source.fileno())
        if status.st_size < _SMALLEST:
            return read_annotations(path, with_masks=with_masks, only=only)
        name, key = _identify(source, path.name, with_masks, only)
        places = storage_paths(path, path.parent, name)
        stored, _ = _find(places, key)
        if stored is None:
            _lock(source)
            stored, reasons = _find(places, key)
        if stored is None:
            for reason in reasons:
                logger.warning("%s: it is rebuilt", reason)
            annotations = read_annotations(path, with_masks=with_masks, only=only)
            if _is_unchanged(path, status):
                return _store(annotations, path, places, key)
            return annotations
    report_unlisted(path, stored.unlisted)
    report_flat(path, stored.boxes)
    if stored.placeholder is not None:
        report_placeholder(stored.placeholder)
    return stored


def _is_unchanged(path: Path, before: os.stat_result) -> bool:
    """Return whether a file was neither written nor replaced."""
    try:
        now = path.stat()
    except OSError:
        return False
    unchanged = (now.st_size, now.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    return unchanged and os.path.samestat(now, before)


def _lock(source: BinaryIO) -> None:
    """Wait until no other process has locked the annotation file, and lock it until it is closed.

    Not every system and network file system has locks. Without them each process reads the file.
    """
    with contextlib.suppress(ImportError, OSError):
        import fcntl  # only on POSIX systems

        fcntl.flock(source, fcntl.LOCK_EX)


def _identify(
    source: BinaryIO, name: str, with_masks: bool, only: Collection[str] | None
) -> tuple[str, str]:
    """Return the name of the stored file, and the key of what it must contain."""
    digest = hashlib.sha256()
    while chunk := source.read(_CHUNK):
        digest.update(chunk)
    key = {"format": _FORMAT, "annotations": digest.hexdigest(), "masks": with_masks}
    suffix = "masks" if with_masks else "boxes"
    if only is not None:
        names = "\0".join(sorted(only)).encode("utf-8", "surrogateescape")
        key["only"] = hashlib.sha256(names).hexdigest()
        suffix += f".{key['only'][:8]}"
    return f"{name}.{suffix}.npz", json.dumps(key)


def _find(places: Sequence[Path], key: str) -> tuple[CocoAnnotations | None, list[str]]:
    """Return the first valid stored annotations, and why other files are not valid."""
    reasons = []
    for place in places:
        try:
            stored = _map(place, key)
        except FileNotFoundError:
            continue
        except Exception as error:  # The file may have any content.
            reasons.append(f"{place} is damaged or not a file of annotations ({error})")
            continue
        if stored is not None:
            return stored, reasons
        reasons.append(f"{place} belongs to other annotations, or to another version")
    return None, reasons


def _store(
    annotations: CocoAnnotations, path: Path, places: Sequence[Path], key: str
) -> CocoAnnotations:
    """Store annotations in the first place that can be written, and return them mapped."""
    for place in places:
        try:
            with write_atomically(place) as file:
                _write(annotations, file, key)
        except OSError as error:
            logger.debug("cannot store the annotations at %s: %s", place, error)
            continue
        stored, _ = _find([place], key)
        if stored is not None:
            logger.info("the annotations are stored in %s, for faster starts", place)
            return stored
    logger.warning("the arrays of %s could not be stored: it is read at every start", path)
    return annotations


def _write(annotations: CocoAnnotations, file: BinaryIO, key: str) -> None:
    """Write annotations as a zip: a header in JSON, and the arrays without compression."""
    arrays = {name: getattr(annotations, name) for name in _ARRAYS}
    for name in ("file_names", "segmentations"):
        strings = getattr(annotations, name)
        if strings is not None:
            arrays |= {f"{name}.ends": strings.ends, f"{name}.blob": strings.blob}
    header = {
        "key": key,
        "category_names": list(annotations.category_names.items()),
        "placeholder": annotations.placeholder,
        "unlisted": annotations.unlisted,
    }
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("header.json", json.dumps(header))
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.ascontiguousarray(array), allow_pickle=False)


def _map(place: Path, key: str) -> CocoAnnotations | None:
    """Map stored annotations; None if they have another key.

    Raises:
        Exception: The file is missing, damaged or another file.
    """
    with place.open("rb") as file, zipfile.ZipFile(file) as archive:
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            raise ValueError("compressed content")
        header = json.loads(archive.read("header.json"))
        if header["key"] != key:
            return None
        # This reads the file in pieces; read through the map, it would count as used memory.
        if (damaged := archive.testzip()) is not None:
            raise ValueError(f"wrong checksum of {damaged}")
        arrays = {
            member.filename.removesuffix(".npy"): _map_array(file, member)
            for member in archive.infolist()
            if member.filename.endswith(".npy")
        }
    strings = {
        name: PackedStrings(arrays[f"{name}.blob"], arrays[f"{name}.ends"])
        for name in ("file_names", "segmentations")
        if f"{name}.blob" in arrays
    }
    return _Mapped(
        **{name: arrays[name] for name in _ARRAYS},
        file_names=strings["file_names"],
        segmentations=strings.get("segmentations"),
        category_names={int(number): str(name) for number, name in header["category_names"]},
        placeholder=header["placeholder"],
        unlisted=int(header["unlisted"]),
        stored=place,
        key=key,
    )


def _map_array(file: BinaryIO, member: zipfile.ZipInfo) -> np.ndarray:
    """Map one array of an uncompressed zip, which is then read-only."""
    file.seek(member.header_offset)
    _, name, extra = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    file.seek(name + extra, os.SEEK_CUR)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError(f"{member.filename} has an unknown format")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.hasobject:
        raise ValueError(f"{member.filename} has objects")
    if 0 in shape:
        return np.zeros(shape, dtype)  # Nothing can be mapped.
    return np.memmap(file, dtype, "r", file.tell(), shape).view(np.ndarray)
