"""The one way to open a path: local files, `s3://` and whatever else fsspec knows, with errors a user can act on."""

from __future__ import annotations

import errno
import os
import posixpath
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any, TypeVar

import fsspec
from fsspec.core import url_to_fs

Value = TypeVar("Value")

# How often a folder is tried to be removed while others remove parts of it.
_MAX_REMOVE_ATTEMPTS = 20
_STORAGE_MODULES = {"botocore", "aiobotocore", "aiohttp", "s3fs", "fsspec", "gcsfs", "adlfs"}
# What another try will not change: the names, the rights and the credentials are wrong.
_PERMANENT_ERRORS = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError)
_PERMANENT_ERROR_NAMES = {"NoCredentialsError", "PartialCredentialsError", "ParamValidationError", "InvalidURL"}
_INITIAL_BACKOFF_S, _MAX_BACKOFF_S = 0.5, 60.0


class StorageUnavailableError(ValueError):
    """Storage failed in a way that may pass: no answer, an error of the server, a full disk."""


def is_transient(error: Exception) -> bool:
    """Whether what a file system raised could be different at the next try."""
    if isinstance(error, StorageUnavailableError):
        return True
    if isinstance(error, _PERMANENT_ERRORS) or type(error).__name__ in _PERMANENT_ERROR_NAMES:
        return False
    # An object store that answers "your request is wrong" (a range behind the end of a file) will say so again.
    response = getattr(error.__cause__ or error, "response", None)
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) if isinstance(response, dict) else 0
    if 400 <= status < 500 and status not in (408, 429):
        return False
    return isinstance(error, OSError) or type(error).__module__.split(".")[0] in _STORAGE_MODULES


@contextmanager
def translate_errors(url: str, action: str) -> Iterator[None]:
    """Turns what a file system raises about `url` into one ValueError sentence; `action` completes "cannot …".

    Raises:
        Unavailable: a ValueError that may pass, see `persistently`.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise ValueError(f"cannot {action} {url}: it does not exist") from error
    except Exception as error:
        if isinstance(error, OSError) or type(error).__module__.split(".")[0] in _STORAGE_MODULES:
            error_type = StorageUnavailableError if is_transient(error) else ValueError
            raise error_type(f"cannot {action} {url}: {_error_reason(error, url)}") from error
        raise


def _error_reason(error: Exception, url: str) -> str:
    """What a file system says is wrong, and with which other file or folder if it is not the one of the URL."""
    if isinstance(error, OSError) and error.strerror:
        names_other_file = isinstance(error.filename, str) and not error.filename.endswith(url.rpartition("/")[2])
        return f"{error.strerror}: {error.filename}" if names_other_file else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def retry_while_unavailable(operation: Callable[[], Value], timeout_s: float, on_retry: Callable[[str], None]) -> Value:
    """Calls an operation until storage is there: again after about 0.5, 1, 2, 4 … and at most 60 seconds.

    Args:
        operation: is called from its beginning each time.
        patience: seconds after which the newest `Unavailable` is raised.
        say: hears of each failure that is followed by another try.
    """
    pause, end = _INITIAL_BACKOFF_S, time.monotonic() + timeout_s
    while True:
        try:
            return operation()
        except StorageUnavailableError as error:
            remaining_s = end - time.monotonic()
            if remaining_s <= 0:
                raise
            on_retry(f"{error}; trying again")
        # Not all workers at the same moment.
        time.sleep(min(remaining_s, pause * random.uniform(0.5, 1)))
        pause = min(2 * pause, _MAX_BACKOFF_S)


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path inside it.

    Raises:
        ValueError: the URL's scheme is unknown or needs a package that is not installed.
    """
    try:
        return url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ValueError(f"cannot use {url}: {error}") from error


def join(url: str, *parts: str) -> str:
    """Path or URL of something inside the folder `url`."""
    return posixpath.join(url.rstrip("/") or "/", *parts)


def is_local(url: str) -> bool:
    """Whether the URL names a path on this machine."""
    protocol = filesystem(url)[0].protocol
    return "file" in ((protocol,) if isinstance(protocol, str) else protocol)


def absolute(url: str) -> str:
    """The same place, named so that a process in another folder finds it too."""
    return os.path.abspath(filesystem(url)[1]) if is_local(url) else url


def exists(url: str) -> bool:
    """Whether a file or folder is there."""
    fs, path = filesystem(url)
    with translate_errors(url, "look at"):
        return bool(fs.exists(path))


@contextmanager
def open_url(url: str, mode: str = "rb") -> Iterator[IO[Any]]:
    """Opens a file for reading ("r", "rb") or writing ("w", "wb", folders are made as needed)."""
    action = "write" if "w" in mode else "read"
    with translate_errors(url, action):
        fs, path = filesystem(url)
        if action == "write":
            fs.makedirs(posixpath.dirname(path), exist_ok=True)
        handle = fsspec.open(url, mode).open()
    try:
        yield handle
    finally:
        with translate_errors(url, action):
            handle.close()


def read_bytes(url: str) -> bytes:
    """The whole file."""
    with translate_errors(url, "read"):
        fs, path = filesystem(url)
        return bytes(fs.cat_file(path))


def read_text(url: str) -> str:
    """The whole file, which must be text (UTF-8)."""
    try:
        return read_bytes(url).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{url} is not a text file") from error


def write_bytes(url: str, data: bytes) -> None:
    """Writes a whole file aside and then makes it visible in one step, so a reader never sees half of it."""
    with translate_errors(url, "write"):
        fs, path = filesystem(url)
        fs.makedirs(posixpath.dirname(path), exist_ok=True)
        if is_local(url):
            if fs.isdir(path):
                # Moving into it would be no error.
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
            fs.pipe_file(path + ".partial", data)
            fs.mv(path + ".partial", path)
        else:
            fs.pipe_file(path, data)


def list_folder(url: str) -> list[str]:
    """Names of what lies directly in a folder, sorted; an absent folder is empty."""
    fs, path = filesystem(url)
    with translate_errors(url, "list"):
        if not fs.exists(path):
            return []
        fs.invalidate_cache(path)
        return sorted(posixpath.basename(entry.rstrip("/")) for entry in fs.ls(path, detail=False))


def remove(url: str) -> None:
    """Deletes a file, if it is there."""
    with translate_errors(url, "delete"):
        fs, path = filesystem(url)
        if fs.exists(path):
            fs.rm_file(path)


def upload(local_path: str, url: str) -> None:
    """Copies a local file to a URL."""
    with translate_errors(url, "write"):
        fs, path = filesystem(url)
        fs.makedirs(posixpath.dirname(path), exist_ok=True)
        fs.put_file(local_path, path)


def download(url: str, local_path: str) -> None:
    """Copies a file to a local path."""
    with translate_errors(url, "read"):
        fs, path = filesystem(url)
        try:
            fs.get_file(path, local_path)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            folder = os.path.dirname(local_path)
            raise StorageUnavailableError(
                f"cannot copy {url} to the scratch folder {folder}: its disk is full; make room there, or set TMPDIR "
                "to a folder with more"
            ) from error


def remove_folder(url: str) -> None:
    """Removes a folder and what lies in it; an absent one is fine."""
    fs, path = filesystem(url)
    with translate_errors(url, "remove"):
        for attempt in range(_MAX_REMOVE_ATTEMPTS):
            # Another process may be removing parts of it; who waits a little longer each time leaves it to the others.
            time.sleep(0.01 * attempt)
            with suppress(FileNotFoundError):
                if not fs.exists(path):
                    return
                fs.rm(path, recursive=True)
        if fs.exists(path):
            fs.rm(path, recursive=True)


def copy_folder(source: str, destination: str) -> None:
    """Copies the files that lie directly in a folder to another one."""
    for name in list_folder(source):
        write_bytes(join(destination, name), read_bytes(join(source, name)))
