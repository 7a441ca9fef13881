"""Fetch sample files from shards with range reads, and decode images."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import IO, TypeVar

from PIL import Image

from bsq_ray import storage
from bsq_ray.data.manifest import Manifest, Shard
from bsq_ray.data.tar_members import is_member_of
from bsq_ray.media.images import DECODE_ERRORS, decode_error_text, decode_image

# Remote files up to this size are fetched whole.
_SMALL_FILE_BYTES = 4 * 2**20
_SampleLocation = tuple[Shard, int]
_HEADER_BYTES = tarfile.BLOCKSIZE
_Value = TypeVar("_Value")


def fetch_encoded(
    manifest: Manifest, samples: Iterable[int], timeout_s: float = 0.0, on_retry: Callable[[str], None] = lambda _: None
) -> list[bytes | Exception]:
    """Return the files of samples; for each unreadable file, return an exception in its position.

    Args:
        manifest: manifest of the data set.
        samples: indices of the samples in the data set.
        timeout_s: seconds to retry unavailable remote storage.
        on_retry: called with a message before each retry.
    """
    locations = [manifest.locate(sample) for sample in samples]
    if storage.is_local(manifest.url):
        return _fetch_local(manifest.url, locations)
    blobs: list[bytes | Exception] = [storage.StorageUnavailableError()] * len(locations)

    def fetch_missing() -> None:
        """Fetch the missing files; raise a transient error for a retry."""
        missing = [p for p, blob in enumerate(blobs) if isinstance(blob, Exception) and storage.is_transient(blob)]
        for p, blob in zip(missing, _fetch_remote(manifest.url, [locations[p] for p in missing]), strict=True):
            blobs[p] = blob
        for p in missing:
            blob = blobs[p]
            if isinstance(blob, Exception) and storage.is_transient(blob):
                with storage.translate_errors(storage.join(manifest.url, locations[p][0].name), "read"):
                    raise blob

    # After the timeout, files that are still missing are returned as exceptions.
    with suppress(storage.StorageUnavailableError):
        storage.retry_while_unavailable(fetch_missing, timeout_s, on_retry)
    return blobs


def _fetch_remote(url: str, locations: list[_SampleLocation]) -> list[bytes | Exception]:
    fs, root = storage.filesystem(url)
    paths = [storage.join(root, shard.name) for shard, _ in locations]
    starts = [shard.offsets[index] - _HEADER_BYTES for shard, index in locations]
    ends = [shard.offsets[index] + shard.sizes[index] for shard, index in locations]
    blobs = fs.cat_ranges(paths, starts, ends, on_error="return")
    return [_strip_header(blob, *location) for blob, location in zip(blobs, locations, strict=True)]


def _fetch_local(url: str, locations: list[_SampleLocation]) -> list[bytes | Exception]:
    _, root = storage.filesystem(url)
    blobs: list[bytes | Exception] = [b""] * len(locations)
    by_shard: dict[str, list[int]] = {}
    for position, (shard, _) in enumerate(locations):
        by_shard.setdefault(shard.name, []).append(position)
    for name, shard_positions in by_shard.items():
        try:
            with open(storage.join(root, name), "rb", buffering=0) as file:
                for position in sorted(shard_positions, key=lambda p: locations[p][0].offsets[locations[p][1]]):
                    shard, index = locations[position]
                    file.seek(shard.offsets[index] - _HEADER_BYTES)
                    blobs[position] = _strip_header(file.read(_HEADER_BYTES + shard.sizes[index]) or b"", shard, index)
        except OSError as error:
            for position in shard_positions:
                blobs[position] = error
    return blobs


def _strip_header(data: bytes | Exception, shard: Shard, index: int) -> bytes | Exception:
    """Return the file without its tar header; return an error if the header does not match the manifest."""
    if isinstance(data, Exception) or len(data) <= _HEADER_BYTES:
        return data if isinstance(data, Exception) else b""
    try:
        header = tarfile.TarInfo.frombuf(data[:_HEADER_BYTES], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return ValueError("the shard does not match the manifest")
    if header.size != shard.sizes[index] or not _can_have_name(header.name, shard, index):
        return ValueError(f"the shard contains {header.name} at this offset")
    return data[_HEADER_BYTES:]


def _can_have_name(name: str, shard: Shard, index: int) -> bool:
    """Return True if a name in a tar header can be that of a sample, or of the sample that it is a link to."""
    key = shard.keys[index]
    # Names that do not fit into the header are stored in an extension record.
    if is_member_of(name, key) or len(name) >= tarfile.LENGTH_NAME or not key.isascii():
        return True
    same_data = (key for key, offset in zip(shard.keys, shard.offsets, strict=True) if offset == shard.offsets[index])
    return any(not other.isascii() or is_member_of(name, other) for other in same_data)


def check_shard(shard: Shard, content: bytes, url: str) -> None:
    """Check every sample of a new manifest entry as it will be checked when it is read.

    Raises:
        ValueError: a sample cannot be read at its offset.
    """
    view = memoryview(content)
    for index, key in enumerate(shard.keys):
        header = bytes(view[shard.offsets[index] - _HEADER_BYTES : shard.offsets[index] + 1])
        blob = _strip_header(header, shard, index)
        if isinstance(blob, Exception):
            raise ValueError(f"{url}: {key} cannot be read back: {blob}; write the shard again")


class ShardFiles:
    """Files of a batch of samples, opened one at a time.

    Small remote files are fetched together in one request. Local and large files are read on demand, only the
    requested bytes.

    Args:
        manifest: manifest of the data set.
        locations: shard and index in the shard, for each sample.
        timeout_s, on_retry: see `fetch_encoded`.
    """

    def __init__(
        self,
        manifest: Manifest,
        locations: Sequence[_SampleLocation],
        timeout_s: float = 0.0,
        on_retry: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.url, self._timeout_s, self._on_retry = manifest.url, timeout_s, on_retry
        self._blobs: dict[tuple[str, int], bytes | Exception] = {}
        if storage.is_local(manifest.url):
            return
        shard_starts = {
            shard.name: int(start) for shard, start in zip(manifest.shards, manifest.shard_starts[:-1], strict=True)
        }
        small = {(shard.name, index) for shard, index in locations if shard.sizes[index] <= _SMALL_FILE_BYTES}
        samples = {(name, index): shard_starts[name] + index for name, index in sorted(small)}
        self._blobs = dict(zip(samples, fetch_encoded(manifest, samples.values(), timeout_s, on_retry), strict=True))

    @contextmanager
    def open(self, shard: Shard, index: int) -> Iterator[IO[bytes]]:
        """Open the file of a sample.

        Raises:
            ValueError: the file cannot be fetched, or the shard is truncated; the message gives the reason.
        """
        blob, size = self._blobs.get((shard.name, index)), shard.sizes[index]
        if blob is not None:
            yield io.BytesIO(check_length(blob, size))
            return
        url = storage.join(self.url, shard.name)
        with ExitStack() as stack:
            file = self._retry(url, lambda: stack.enter_context(storage.open_url(url)))
            num_available = self._retry(url, lambda: file.seek(0, io.SEEK_END)) - shard.offsets[index]
            if num_available < size:
                raise ValueError(f"the shard ends after {max(0, num_available)} of the {size} bytes of this file")

            def read(offset: int, count: int) -> bytes:
                file.seek(shard.offsets[index] + offset)
                return bytes(file.read(count))

            reader = _RangeReader(size, lambda offset, count: self._retry(url, lambda: read(offset, count)))
            yield io.BufferedReader(reader)

    def _retry(self, url: str, operation: Callable[[], _Value]) -> _Value:
        def attempt() -> _Value:
            with storage.translate_errors(url, "read"):
                return operation()

        return storage.retry_while_unavailable(attempt, self._timeout_s, self._on_retry)


class _RangeReader(io.RawIOBase):
    """Read-only file over a byte range of a shard; `read_range(offset, count)` returns bytes of the range."""

    def __init__(self, size: int, read_range: Callable[[int, int], bytes]) -> None:
        self.size, self.read_range, self.position = size, read_range, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = max(0, offset + (0, self.position, self.size)[whence])
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self.read_range(self.position, max(0, min(len(buffer), self.size - self.position)))
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


def check_length(blob: bytes | Exception, size: int) -> bytes:
    """Return a fetched file after checking its size.

    Args:
        blob: content of the file, or the error raised by the fetch.
        size: size in bytes, from the manifest.

    Raises:
        ValueError: the file could not be fetched, or is truncated.
    """
    if isinstance(blob, Exception):
        raise ValueError(f"cannot be read: {' '.join(str(blob).split())}")
    if len(blob) != size:
        raise ValueError(f"the shard ends after {len(blob)} of the {size} bytes of this file")
    return blob


def decode_blob(blob: bytes | Exception, size: int, short_side: int | None) -> Image.Image:
    """Decode a fetched image file.

    Args:
        blob, size: see `check_length`.
        short_side: size for scaled decoding of JPEGs, see `load_rgb`.

    Raises:
        ValueError: the file could not be fetched, is truncated, or is not an image; the message gives the reason.
    """
    data = check_length(blob, size)
    try:
        return decode_image(data, short_side)
    except DECODE_ERRORS as error:
        raise ValueError(decode_error_text(error)) from error
