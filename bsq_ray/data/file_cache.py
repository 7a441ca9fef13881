"""Keep copies of remote files in a folder of bounded size, shared by all processes of a node.

    open ─┬─ copy exists ──────────────────────────────────────────────────────────────────▶ open the copy
          └─ lock the file ─▶ remove the least recently used ones ─▶ download ─▶ rename ─▶ open the copy

Locks are released when a process ends, so a crash blocks no one. A partial download never has the name of a copy.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from bsq_ray import config, storage

Opened = TypeVar("Opened")

# Number of lock files. Two files that share a lock are downloaded one after the other.
_NUM_LOCKS = 256
_COPY, _PARTIAL = ".copy", ".partial"


class CacheUnavailableError(ValueError):
    """The folder of a cache cannot be written; its files can still be read from their storage."""


@dataclass(frozen=True)
class FileCache:
    """A folder with copies of remote files.

    Args:
        folder: local folder; it is created.
        max_bytes: size of all copies together, including those that are being downloaded.
    """

    folder: str
    max_bytes: int

    def open(self, url: str, version: str, num_bytes: int, open_local: Callable[[str], Opened]) -> Opened:
        """Open the copy of a file; download it first unless a process of this node did.

        Args:
            url: the remote file.
            version: identifier of its content; another one is another copy.
            num_bytes: size of the file; at most `max_bytes`.
            open_local: called with the path of the copy; an open file stays readable when its copy is removed.

        Raises:
            CacheUnavailableError: the folder cannot be written, or its disk is full.
            StorageUnavailableError: the storage is unavailable.
            ValueError: the file does not exist or has another size.
        """
        assert num_bytes <= self.max_bytes, "the caller reads larger files without the cache"
        name = hashlib.sha256(f"{url} {version}".encode()).hexdigest()
        copy = os.path.join(self.folder, f"{name}.{num_bytes}{_COPY}")
        with self._translate_folder_errors():
            with suppress(FileNotFoundError):
                return _open_copy(copy, open_local)
            with self._lock(name):
                # Another process may have downloaded the file. Under the lock, no eviction removes the copy.
                with suppress(FileNotFoundError), self._lock("eviction"):
                    return _open_copy(copy, open_local)
                return self._download(url, num_bytes, copy, open_local)

    def can_hold(self, num_bytes: int) -> bool:
        """Return True if a file of this size fits."""
        return num_bytes <= self.max_bytes

    def _download(self, url: str, num_bytes: int, copy: str, open_local: Callable[[str], Opened]) -> Opened:
        partial = copy.removesuffix(_COPY) + _PARTIAL
        with self._lock("eviction"):
            # A previous attempt may have left it.
            Path(partial).unlink(missing_ok=True)
            self._evict(num_bytes)
            if shutil.disk_usage(self.folder).free < num_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.folder)
            Path(partial).touch()
        try:
            storage.download(url, partial)
            actual_bytes = os.path.getsize(partial)
            if actual_bytes != num_bytes:
                raise ValueError(f"{url} has {actual_bytes} bytes, but the manifest requires {num_bytes}")
            # Under the lock, an eviction counts either the partial file or the copy.
            with self._lock("eviction"):
                os.replace(partial, copy)
                return _open_copy(copy, open_local)
        finally:
            with self._lock("eviction"):
                Path(partial).unlink(missing_ok=True)

    def _evict(self, num_bytes: int) -> None:
        """Remove the least recently used copies until a file of `num_bytes` fits."""
        files: list[tuple[float, int, os.DirEntry[str]]] = []
        for entry in os.scandir(self.folder):
            if not entry.name.endswith((_COPY, _PARTIAL)):
                continue
            name, size_text, _ = entry.name.split(".")
            if entry.name.endswith(_PARTIAL) and self._is_abandoned(name):
                os.unlink(entry.path)
                continue
            files.append((entry.stat().st_mtime, int(size_text), entry))
        free_bytes = self.max_bytes - num_bytes - sum(size for _, size, _ in files)
        for _, size, entry in sorted(files, key=lambda file: file[0]):
            if free_bytes >= 0:
                return
            if entry.name.endswith(_COPY):
                os.unlink(entry.path)
                free_bytes += size

    def _is_abandoned(self, name: str) -> bool:
        """Return True if no process downloads the file; a partial download of a crashed one is left over."""
        with open(self._lock_path(name), "ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        path = self._lock_path(name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _lock_path(self, name: str) -> str:
        is_digest = name != "eviction"
        return os.path.join(self.folder, "locks", str(int(name[:8], 16) % _NUM_LOCKS) if is_digest else name)

    @contextmanager
    def _translate_folder_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CacheUnavailableError(
                f"cannot write to the cache folder {self.folder}: {error.strerror or error}"
            ) from error


def _open_copy(copy: str, open_local: Callable[[str], Opened]) -> Opened:
    """Open a copy; its modification time becomes the time of its last use."""
    now_ns = time.time_ns()
    os.utime(copy, ns=(now_ns, now_ns))
    return open_local(copy)


def open_shard_cache(data_config: config.DataConfig) -> FileCache | None:
    """Return the cache that a configuration describes; None if it has no folder."""
    if data_config.cache.folder is None:
        return None
    return FileCache(os.path.abspath(data_config.cache.folder), int(data_config.cache.size_gb * 1e9))
