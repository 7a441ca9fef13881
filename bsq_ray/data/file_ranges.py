"""Read parts of files: samples of a tar, the head of a shard, the footer of a Parquet file.

local     opened and read at the position
remote    one ranged request, without another one to learn the size
"""

from __future__ import annotations

import os

from bsq_ray import storage


def read_range(url: str, offset: int, num_bytes: int) -> bytes:
    """Read bytes of a file, fewer at its end.

    Raises:
        StorageUnavailableError: the storage is unavailable.
        ValueError: the file does not exist or cannot be read.
    """
    with storage.translate_errors(url, "read"):
        fs, path = storage.filesystem(url)
        if not storage.is_local(url):
            return bytes(fs.cat_file(path, start=offset, end=offset + num_bytes))
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(num_bytes)


def read_tail(url: str, num_bytes: int) -> bytes:
    """Read the last bytes of a file, or the whole file if it is shorter.

    Raises:
        StorageUnavailableError: the storage is unavailable.
        ValueError: the file does not exist or cannot be read.
    """
    with storage.translate_errors(url, "read"):
        fs, path = storage.filesystem(url)
        if not storage.is_local(url):
            return bytes(fs.cat_file(path, start=-num_bytes))
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - num_bytes))
            return file.read()
