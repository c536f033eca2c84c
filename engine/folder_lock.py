"""The lock of an output folder, so that two runs do not write over each other's files."""

import errno
import fcntl
import logging
import os
import socket
import time
from pathlib import Path
from typing import TextIO

from engine.errors import UserError

__all__ = ["FolderInUseError", "lock_folder"]

logger = logging.getLogger(__name__)

_NAME = ".run.lock"


class FolderInUseError(UserError):
    """Another process has the lock of the folder."""


def lock_folder(folder: Path) -> TextIO | None:
    """Lock an output folder until the returned file is closed or this process ends.

    The operating system releases the lock of a process that crashes or is killed. Child processes,
    such as workers of a data loader, do not inherit it.

    Args:
        folder: Existing folder.

    Returns:
        The open file of the lock; None if the file system has no locks.

    Raises:
        FolderInUseError: Another process has the lock.
        UserError: The file of the lock cannot be written.
    """
    path = folder / _NAME
    try:
        file = open(path, "r+", encoding="utf-8", opener=_open)  # noqa: SIM115
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = " ".join(file.read(200).split())
        file.close()
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            logger.warning("%s cannot be locked (%s): start no second run in it", folder, error)
            return None
        raise FolderInUseError(
            f"--output_dir {folder} is in use by another run ({owner}): wait for its end, or give "
            "another folder"
        ) from None
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}, since {now}\n")
    file.flush()
    return file


def _open(path: str, flags: int) -> int:
    """Open the file of a lock, which is created if it is missing; a link is an error."""
    return os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
