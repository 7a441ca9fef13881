"""Read parts of a tar file: headers and labels, but not the images and videos between them.

local        the parts that are read
remote       small tars as a whole, with one request; large ones in blocks, so that videos are skipped
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

from bsq_ray import storage

# One request for so many bytes takes less time than requests for the headers in them.
_WHOLE_BYTES = 256 * 2**20
_BLOCK_BYTES = 2**20


@dataclass(frozen=True)
class ShardContent:
    """The content of an open tar.

    Attributes:
        file: seekable file.
        num_bytes: size.
    """

    file: IO[bytes]
    num_bytes: int

    def read(self, offset: int, num_bytes: int) -> bytes:
        """Read bytes; fewer at the end of the file."""
        self.file.seek(offset)
        return self.file.read(num_bytes)

    def part(self, offset: int, num_bytes: int) -> ShardContent:
        """Return a part of the content, such as a tar inside of a tar."""
        return ShardContent(io.BufferedReader(_PartFile(self.file, offset, num_bytes)), num_bytes)

    def find_nonzero(self, offset: int) -> int | None:
        """Return the position of the first byte from `offset` on that is not zero; None if there is none."""
        while block := self.read(offset, _BLOCK_BYTES):
            if stripped := block.lstrip(b"\0"):
                return offset + len(block) - len(stripped)
            offset += len(block)
        return None


class _PartFile(io.RawIOBase):
    """A range of a seekable file, as a file."""

    def __init__(self, file: IO[bytes], start: int, num_bytes: int) -> None:
        self._file, self._start, self._num_bytes, self._position = file, start, num_bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._num_bytes}[whence]
        self._position = max(0, origin + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._position)
        data = self._file.read(max(0, min(len(buffer), self._num_bytes - self._position)))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def content_of(data: bytes) -> ShardContent:
    """Return the content of a tar in memory."""
    return ShardContent(io.BytesIO(data), len(data))


@contextmanager
def open_content(url: str) -> Iterator[ShardContent]:
    """Open a tar; see the module for what is read."""
    fs, path = storage.filesystem(url)
    with storage.translate_errors(url, "read"):
        num_bytes = int(fs.size(path))
    if storage.is_local(url):
        with storage.translate_errors(url, "read"), open(path, "rb") as file:
            yield ShardContent(file, num_bytes)
    elif num_bytes <= _WHOLE_BYTES:
        yield content_of(storage.read_bytes(url))
    else:
        with (
            storage.translate_errors(url, "read"),
            fs.open(path, "rb", block_size=_BLOCK_BYTES, cache_type="blockcache") as file,
        ):
            yield ShardContent(file, num_bytes)
