"""Open, write and remove files by path or URL: local, `s3://` and every other file system of fsspec.

Every error is a `ValueError` with one sentence for the user. `StorageUnavailableError` marks those worth a retry.
"""

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

# Attempts to remove a folder while other processes remove parts of it.
_MAX_REMOVE_ATTEMPTS = 20
_STORAGE_MODULES = {"botocore", "aiobotocore", "aiohttp", "s3fs", "fsspec", "gcsfs", "adlfs"}
# Errors that a retry does not change: wrong names, permissions or credentials.
_PERMANENT_ERRORS = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError)
_PERMANENT_ERROR_NAMES = {"NoCredentialsError", "PartialCredentialsError", "ParamValidationError", "InvalidURL"}
_REQUEST_TIMEOUT, _TOO_MANY_REQUESTS = 408, 429
_INITIAL_BACKOFF_S, _MAX_BACKOFF_S = 0.5, 60.0


class StorageUnavailableError(ValueError):
    """Storage failed in a way that may pass: no response, an error of the server, a full disk."""


def is_transient(error: Exception) -> bool:
    """Return True if an error of a file system may not occur again on a retry."""
    if isinstance(error, StorageUnavailableError):
        return True
    if isinstance(error, _PERMANENT_ERRORS) or type(error).__name__ in _PERMANENT_ERROR_NAMES:
        return False
    # An object store rejects an invalid request (such as a range behind the end of a file) every time.
    response = getattr(error.__cause__ or error, "response", None)
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) if isinstance(response, dict) else 0
    if 400 <= status < 500 and status not in (_REQUEST_TIMEOUT, _TOO_MANY_REQUESTS):
        return False
    return isinstance(error, OSError) or type(error).__module__.split(".")[0] in _STORAGE_MODULES


@contextmanager
def translate_errors(url: str, action: str) -> Iterator[None]:
    """Turn what a file system raises about `url` into one ValueError sentence.

    Args:
        url: file or folder that the message names.
        action: verb that completes "cannot …".

    Raises:
        StorageUnavailableError: the error may pass, see `retry_while_unavailable`.
        ValueError: any other error of the file system.
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
    """Return the message of a file system, with the file it names if that is not the one of the URL."""
    if isinstance(error, OSError) and error.strerror:
        names_other_file = isinstance(error.filename, str) and not error.filename.endswith(url.rpartition("/")[2])
        return f"{error.strerror}: {error.filename}" if names_other_file else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def retry_while_unavailable(operation: Callable[[], Value], timeout_s: float, on_retry: Callable[[str], None]) -> Value:
    """Call an operation again while it raises `StorageUnavailableError`.

    The pauses are about 0.5, 1, 2, 4 … and at most 60 seconds; random factors keep workers apart.

    Args:
        operation: called from its start each time.
        timeout_s: seconds after which the last error is raised; 0 never retries.
        on_retry: called with a message before each retry.

    Raises:
        StorageUnavailableError: the operation still fails after `timeout_s` seconds.
    """
    pause_s, end = _INITIAL_BACKOFF_S, time.monotonic() + timeout_s
    while True:
        try:
            return operation()
        except StorageUnavailableError as error:
            remaining_s = end - time.monotonic()
            if remaining_s <= 0:
                raise
            on_retry(f"{error}; trying again")
        time.sleep(min(remaining_s, pause_s * random.uniform(0.5, 1)))
        pause_s = min(2 * pause_s, _MAX_BACKOFF_S)


def filesystem(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of a URL, and the path inside it.

    Raises:
        ValueError: the URL's scheme is unknown or needs a package that is not installed.
    """
    try:
        return url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ValueError(f"cannot use {url}: {error}") from error


def join(url: str, *parts: str) -> str:
    """Return the path or URL of an entry inside the folder `url`."""
    return posixpath.join(url.rstrip("/") or "/", *parts)


def is_local(url: str) -> bool:
    """Return True if the URL is a path on this node."""
    protocol = filesystem(url)[0].protocol
    return "file" in ((protocol,) if isinstance(protocol, str) else protocol)


def absolute(url: str) -> str:
    """Return a name of the same file that is valid in a process with another working folder."""
    return os.path.abspath(filesystem(url)[1]) if is_local(url) else url


def exists(url: str) -> bool:
    """Return True if the file or folder exists."""
    fs, path = filesystem(url)
    with translate_errors(url, "look at"):
        return bool(fs.exists(path))


@contextmanager
def open_url(url: str, mode: str = "rb") -> Iterator[IO[Any]]:
    """Open a file for reading ("r", "rb") or writing ("w", "wb"; missing folders are created)."""
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
    """Read a whole file."""
    with translate_errors(url, "read"):
        fs, path = filesystem(url)
        return bytes(fs.cat_file(path))


def read_text(url: str) -> str:
    """Read a whole text file (UTF-8).

    Raises:
        ValueError: the file is not text.
    """
    try:
        return read_bytes(url).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{url} is not a text file") from error


def write_bytes(url: str, data: bytes) -> None:
    """Write a whole file under a temporary name, then rename it: readers never see a part of it."""
    with translate_errors(url, "write"):
        fs, path = filesystem(url)
        fs.makedirs(posixpath.dirname(path), exist_ok=True)
        if is_local(url):
            if fs.isdir(path):
                # Renaming would move the file into the folder.
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
            fs.pipe_file(path + ".partial", data)
            fs.mv(path + ".partial", path)
        else:
            fs.pipe_file(path, data)


def list_folder(url: str) -> list[str]:
    """Return the sorted names of the entries of a folder; none if it does not exist."""
    fs, path = filesystem(url)
    with translate_errors(url, "list"):
        if not fs.exists(path):
            return []
        fs.invalidate_cache(path)
        return sorted(posixpath.basename(entry.rstrip("/")) for entry in fs.ls(path, detail=False))


def remove(url: str) -> None:
    """Delete a file if it exists."""
    with translate_errors(url, "delete"):
        fs, path = filesystem(url)
        if fs.exists(path):
            fs.rm_file(path)


def upload(local_path: str, url: str) -> None:
    """Copy a local file to a URL."""
    with translate_errors(url, "write"):
        fs, path = filesystem(url)
        fs.makedirs(posixpath.dirname(path), exist_ok=True)
        fs.put_file(local_path, path)


def download(url: str, local_path: str) -> None:
    """Copy a file to a local path.

    Raises:
        StorageUnavailableError: the storage is unavailable, or the local disk is full.
    """
    with translate_errors(url, "read"):
        fs, path = filesystem(url)
        try:
            fs.get_file(path, local_path)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            folder = os.path.dirname(local_path)
            raise StorageUnavailableError(
                f"cannot copy {url} to the scratch folder {folder}: its disk is full; free some space, or set TMPDIR "
                "to a larger disk"
            ) from error


def remove_folder(url: str) -> None:
    """Remove a folder and its content; a missing folder is no error."""
    fs, path = filesystem(url)
    with translate_errors(url, "remove"):
        for attempt in range(_MAX_REMOVE_ATTEMPTS):
            # Another process may be removing parts of the folder; growing pauses leave it to the others.
            time.sleep(0.01 * attempt)
            with suppress(FileNotFoundError):
                if not fs.exists(path):
                    return
                fs.rm(path, recursive=True)
        if fs.exists(path):
            fs.rm(path, recursive=True)


def copy_folder(source: str, destination: str) -> None:
    """Copy the files of a folder, without its subfolders, to another folder."""
    for name in list_folder(source):
        write_bytes(join(destination, name), read_bytes(join(source, name)))
