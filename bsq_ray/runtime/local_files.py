"""Read and write local files of every type: regular files, symbolic links, pipes, devices and file descriptors."""

from __future__ import annotations

import errno
import io
import os
import posixpath
import re
import secrets
import stat
from collections.abc import Callable
from contextlib import suppress
from typing import IO

# Temporary name of a local file that is being written; short, because a file name has at most 255 bytes.
PARTIAL_PATTERN = re.compile(r"\.[0-9a-f]{16}\.partial")
# Paths of the file descriptors of this process.
_DESCRIPTOR_PATTERN = re.compile(
    r"/dev/(?:fd/(?P<fd>\d+)|std(?P<name>in|out|err))|/proc/(?:thread-)?self/fd/(?P<proc_fd>\d+)"
)
# Open files of any process. Their links cannot be resolved to a path: that of a pipe is none.
_OPEN_FILE_PATTERN = re.compile(r"/proc/(?:self|thread-self|\d+)/(?:task/\d+/)?fd/\d+")
_STANDARD_DESCRIPTORS = {"in": 0, "out": 1, "err": 2}
_MAX_SYMLINKS = 40
# Errors of an atomic replacement after which overwriting in place may work: a read-only folder, a mounted file.
_IN_PLACE_ERRNOS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY, errno.EXDEV)


def is_special(path: str) -> bool:
    """Return True if a pipe, device or socket exists at the path."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def open_for_reading(path: str) -> IO[bytes]:
    """Open a file for random access; a pipe or device is first read into memory."""
    file = open(path, "rb")  # noqa: SIM115
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    with file:
        return io.BytesIO(file.read())


def write(path: str, write_content: Callable[[IO[bytes]], object]) -> None:
    """Replace a regular file atomically; write into anything else that exists at the path.

    Args:
        path: symbolic links are followed; missing folders are created.
        write_content: writes the content into the open file. It is called again if the file has to be written in place.

    Raises:
        OSError: the file cannot be written; a regular file keeps its previous content.
    """
    target = _resolve_symlinks(path)
    if descriptor := _DESCRIPTOR_PATTERN.fullmatch(target):
        named_fd = descriptor["fd"] or descriptor["proc_fd"]
        fd = int(named_fd) if named_fd else _STANDARD_DESCRIPTORS[descriptor["name"]]
        # A duplicate shares the file offset, as a shell expects; opening the path again would start at offset 0.
        with open(os.dup(fd), "wb") as file:
            write_content(file)
        return
    try:
        can_replace = stat.S_ISREG(os.stat(target).st_mode) and not _OPEN_FILE_PATTERN.fullmatch(target)
    except (FileNotFoundError, NotADirectoryError):
        can_replace = True
        os.makedirs(posixpath.dirname(target), exist_ok=True)
    if not can_replace:
        # Another process continues behind what is appended to its open file. Raises IsADirectoryError for a folder.
        with open(target, "ab" if _OPEN_FILE_PATTERN.fullmatch(target) else "wb") as file:
            write_content(file)
        return
    try:
        _replace_file(target, write_content)
    except OSError as error:
        if error.errno not in _IN_PLACE_ERRNOS or not os.path.isfile(target):
            raise
        with open(target, "wb") as file:
            write_content(file)


def _resolve_symlinks(path: str) -> str:
    """Resolve symbolic links; paths of file descriptors of this process are not resolved further."""
    for _ in range(_MAX_SYMLINKS):
        is_open_file = _DESCRIPTOR_PATTERN.fullmatch(path) or _OPEN_FILE_PATTERN.fullmatch(path)
        if is_open_file or not os.path.islink(path):
            return path
        path = os.path.join(os.path.realpath(posixpath.dirname(path)), os.readlink(path))
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)


def _replace_file(path: str, write_content: Callable[[IO[bytes]], object]) -> None:
    """Write a temporary file in the same folder and rename it."""
    # A random name, because a task retried by Ray may run at the same time as its first attempt.
    partial = posixpath.join(posixpath.dirname(path), f".{secrets.token_hex(8)}.partial")
    try:
        with open(partial, "xb") as file:
            with suppress(FileNotFoundError):
                os.fchmod(file.fileno(), stat.S_IMODE(os.stat(path).st_mode))
            write_content(file)
        os.replace(partial, path)
    except BaseException as error:
        with suppress(OSError):
            os.remove(partial)
        if isinstance(error, OSError):
            # Error messages show the user's path, not the temporary one.
            error.filename = path
        raise
