"""Open, write and remove files by path or URL: local, `s3://` and every other file system of fsspec.

Only a name that starts with `scheme://` is a URL; every other name is a local path, such as `a::b` or `file:x`.
Every error is a `ValueError` with one sentence for the user. `StorageUnavailableError` marks those worth a retry.
"""

from __future__ import annotations

import errno
import glob
import os
import posixpath
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from bsq_ray.runtime import local_files

# fsspec and tenacity are imported when they are used: commands that read presets only start without them.
if TYPE_CHECKING:
    import tenacity

Value = TypeVar("Value")

# Attempts to remove a folder while other processes remove parts of it.
_MAX_REMOVE_ATTEMPTS = 20
_STORAGE_MODULES = {"botocore", "aiobotocore", "aiohttp", "s3fs", "fsspec", "gcsfs", "adlfs"}
# Errors that a retry does not change: wrong names, permissions or credentials.
_PERMANENT_ERRORS = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError)
_PERMANENT_ERROR_NAMES = {"NoCredentialsError", "PartialCredentialsError", "ParamValidationError", "InvalidURL"}
_REQUEST_TIMEOUT, _TOO_MANY_REQUESTS = 408, 429
_INITIAL_BACKOFF_S, _MAX_BACKOFF_S = 0.5, 60.0
# Scheme, and the bucket or host, of a URL.
_URL_PATTERN = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://[^/]*")
_LOCAL_SCHEMES = ("file", "local")
_COPY_BUFFER_BYTES = 2**24


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
    import tenacity

    backoff = tenacity.wait_exponential(multiplier=_INITIAL_BACKOFF_S, max=_MAX_BACKOFF_S)

    def pause_s(state: tenacity.RetryCallState) -> float:
        # The last attempt is made when the time is over, not before.
        remaining_s = timeout_s - (state.seconds_since_start or 0.0)
        return max(0.0, min(remaining_s, backoff(state) * random.uniform(0.5, 1)))

    def report(state: tenacity.RetryCallState) -> None:
        assert state.outcome is not None
        on_retry(f"{state.outcome.exception()}; trying again")

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(StorageUnavailableError),
        stop=tenacity.stop_after_delay(timeout_s),
        wait=pause_s,
        before_sleep=report,
        reraise=True,
    )
    return retrying(operation)


def filesystem(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of a path or URL, and the absolute path inside it.

    Raises:
        ValueError: the path is empty, or the URL's scheme is unknown or needs a package that is not installed.
    """
    import fsspec
    from fsspec.core import url_to_fs

    if not url:
        raise ValueError("a path is empty; name a file or folder")
    match = _URL_PATTERN.match(url)
    if match is None or match[1].lower() in _LOCAL_SCHEMES:
        path = url if match is None else url.partition("://")[2]
        # `~name` is a file name; shells have replaced the home folders of other users already.
        path = os.path.expanduser(path) if path == "~" or path.startswith("~/") else path
        return fsspec.filesystem("file"), os.path.abspath(path)
    try:
        # fsspec would take "::" in the rest of the URL for a chain of file systems.
        fs, _ = url_to_fs(match[0])
        return fs, fs._strip_protocol(url)
    except (ImportError, TypeError, ValueError) as error:
        raise ValueError(f"cannot use {url}: {error}") from error


def join(url: str, *parts: str) -> str:
    """Return the path or URL of an entry inside the folder `url`."""
    return posixpath.join(url.rstrip("/") or "/", *parts)


def is_url(text: str) -> bool:
    """Return True if the text starts with a scheme, as in `s3://bucket/key`; otherwise it is a local path."""
    return _URL_PATTERN.match(text) is not None


def is_local(url: str) -> bool:
    """Return True if the path or URL is a path on this node."""
    match = _URL_PATTERN.match(url)
    return match is None or match[1].lower() in _LOCAL_SCHEMES


def absolute(url: str) -> str:
    """Return a name of the same file that is valid in a process with another working folder."""
    return str(filesystem(url)[1]) if is_local(url) else url


def exists(url: str) -> bool:
    """Return True if the file or folder exists."""
    fs, path = filesystem(url)
    with translate_errors(url, "look at"):
        return bool(fs.exists(path))


def is_special(url: str) -> bool:
    """Return True for a local pipe, device or socket, such as /dev/stdin; its name does not describe its content."""
    return is_local(url) and local_files.is_special(filesystem(url)[1])


@contextmanager
def open_url(url: str) -> Iterator[IO[bytes]]:
    """Open a file for reading with random access; a local pipe or device is read into memory first."""
    with translate_errors(url, "read"):
        fs, path = filesystem(url)
        handle: IO[bytes] = local_files.open_for_reading(path) if is_local(url) else fs.open(path, "rb")
    try:
        yield handle
    finally:
        with translate_errors(url, "read"):
            handle.close()


def read_bytes(url: str) -> bytes:
    """Read a whole file."""
    with translate_errors(url, "read"):
        fs, path = filesystem(url)
        return Path(path).read_bytes() if is_local(url) else bytes(fs.cat_file(path))


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
    """Write a whole file; readers of a regular file never see a part of it.

    A link is followed. Pipes, devices such as /dev/null, and the open files of this process are written to.
    """
    with translate_errors(url, "write"):
        fs, path = filesystem(url)
        if is_local(url):
            local_files.write(path, lambda file: file.write(data))
        else:
            fs.makedirs(posixpath.dirname(path), exist_ok=True)
            fs.pipe_file(path, data)


def write_text(url: str, text: str) -> None:
    """Write a whole text file like `write_bytes`, as UTF-8; bytes of file names that are not UTF-8 become `\\udcXX`."""
    write_bytes(url, text.encode("utf-8", "backslashreplace"))


def list_folder(url: str) -> list[str]:
    """Return the sorted names of the entries of a folder; none if it does not exist."""
    fs, path = filesystem(url)
    with translate_errors(url, "list"):
        if not fs.exists(path):
            return []
        fs.invalidate_cache(path)
        names = (posixpath.basename(entry.rstrip("/")) for entry in fs.ls(path, detail=False))
        return sorted(name for name in names if not local_files.PARTIAL_PATTERN.fullmatch(name))


def file_sizes(url: str) -> dict[str, int]:
    """Return the size in bytes of each file of a folder by its name, from one listing; empty if it does not exist."""
    fs, path = filesystem(url)
    with translate_errors(url, "list"):
        if not fs.exists(path):
            return {}
        fs.invalidate_cache(path)
        entries = [entry for entry in fs.ls(path, detail=True) if entry["type"] != "directory"]
        return {posixpath.basename(entry["name"]): int(entry["size"] or 0) for entry in entries}


def remove(url: str) -> None:
    """Delete a file if it exists."""
    with translate_errors(url, "delete"):
        fs, path = filesystem(url)
        if fs.exists(path):
            fs.rm_file(path)


def upload(local_path: str, url: str) -> None:
    """Copy a local file to a path or URL, as `write_bytes` does."""
    with translate_errors(url, "write"):
        fs, path = filesystem(url)
        if is_local(url):
            local_files.write(path, partial(_copy_to, local_path))
        else:
            fs.makedirs(posixpath.dirname(path), exist_ok=True)
            fs.put_file(local_path, path)


def _copy_to(local_path: str, file: IO[bytes]) -> None:
    with open(local_path, "rb") as source:
        shutil.copyfileobj(source, file, _COPY_BUFFER_BYTES)


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
    # Object stores expand patterns in the names of folders to remove.
    pattern = path if is_local(url) else glob.escape(path)
    with translate_errors(url, "remove"):
        for attempt in range(_MAX_REMOVE_ATTEMPTS):
            # Another process may be removing parts of the folder; growing pauses leave it to the others.
            time.sleep(0.01 * attempt)
            with suppress(FileNotFoundError):
                if not fs.exists(path):
                    return
                fs.rm(pattern, recursive=True)
        if fs.exists(path):
            fs.rm(pattern, recursive=True)


def copy_folder(source: str, destination: str) -> None:
    """Copy the files of a folder, without its subfolders, to another folder."""
    for name in list_folder(source):
        write_bytes(join(destination, name), read_bytes(join(source, name)))
