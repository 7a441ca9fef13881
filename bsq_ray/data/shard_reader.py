"""Fetch sample files from shards with range reads, and decode images."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from typing import IO, Any, TypeVar

import numpy as np
from PIL import Image

from bsq_ray import storage
from bsq_ray.data.file_cache import CacheUnavailableError, FileCache
from bsq_ray.data.manifest import Manifest
from bsq_ray.data.sample_index import SampleEntry, Shard
from bsq_ray.data.shard_content import ShardContent
from bsq_ray.data.tar_members import is_member_of
from bsq_ray.media.images import decode_image

# Remote files up to this size are fetched whole.
_SMALL_FILE_BYTES = 4 * 2**20
# Threads that open remote shards or their indexes; each waits for the storage.
_MAX_OPEN_THREADS = 16
_HEADER_BYTES = tarfile.BLOCKSIZE
SampleLocation = tuple[Shard, int]
_Value = TypeVar("_Value")
_OnRetry = Callable[[str], None]


def _ignore_retry(_: str) -> None:
    pass


def locate_samples(
    manifest: Manifest, samples: Iterable[int], timeout_s: float = 0.0, on_retry: _OnRetry = _ignore_retry
) -> list[SampleLocation]:
    """Return the shard of each sample and its index in the shard; only these shards' indexes are opened.

    Args:
        manifest, samples, timeout_s, on_retry: see `fetch_encoded`.

    Raises:
        StorageUnavailableError: an index is still unavailable after `timeout_s` seconds.
        ValueError: an index is missing or damaged.
    """
    samples_P = np.fromiter(samples, np.int64)
    numbers_P = manifest.shard_numbers(samples_P)
    indices = (samples_P - manifest.shard_starts[numbers_P]).tolist()

    def open_shard(number: int) -> Shard:
        return storage.retry_while_unavailable(lambda: manifest.shard(number), timeout_s, on_retry)

    numbers = np.unique(numbers_P).tolist()
    shards = dict(zip(numbers, _map_remote(open_shard, numbers, manifest.url), strict=True))
    return [(shards[number], index) for number, index in zip(numbers_P.tolist(), indices, strict=True)]


def fetch_encoded(
    manifest: Manifest,
    samples: Iterable[int],
    timeout_s: float = 0.0,
    on_retry: _OnRetry = _ignore_retry,
    cache: FileCache | None = None,
) -> list[bytes | Exception]:
    """Return the files of samples; for each unreadable file, return an exception in its position.

    Args:
        manifest: manifest of the data set.
        samples: indices of the samples in the data set.
        timeout_s: seconds to retry unavailable remote storage.
        on_retry: called with a message before each retry.
        cache: local copies of remote shards; None reads byte ranges of the remote shards.
    """
    locations = locate_samples(manifest, samples, timeout_s, on_retry)
    return fetch_located(manifest.url, locations, timeout_s, on_retry, cache)


def fetch_located(
    url: str,
    locations: Sequence[SampleLocation],
    timeout_s: float = 0.0,
    on_retry: _OnRetry = _ignore_retry,
    cache: FileCache | None = None,
) -> list[bytes | Exception]:
    """Return the files at locations from `locate_samples` in the data set at `url`; see `fetch_encoded`."""
    if storage.is_local(url):
        return _fetch_from_files(url, locations, partial(_open_local, url))
    blobs: list[bytes | Exception] = [storage.StorageUnavailableError()] * len(locations)

    def fetch_missing() -> None:
        """Fetch the missing files; raise a transient error for a retry."""
        missing = [p for p, blob in enumerate(blobs) if isinstance(blob, Exception) and storage.is_transient(blob)]
        missing_locations = [locations[p] for p in missing]
        for p, blob in zip(missing, _fetch_remote(url, missing_locations, cache), strict=True):
            blobs[p] = blob
        for p in missing:
            blob = blobs[p]
            if isinstance(blob, Exception) and storage.is_transient(blob):
                with storage.translate_errors(storage.join(url, locations[p][0].name), "read"):
                    raise blob

    # After the timeout, files that are still missing are returned as exceptions.
    with suppress(storage.StorageUnavailableError):
        storage.retry_while_unavailable(fetch_missing, timeout_s, on_retry)
    return blobs


def _fetch_remote(url: str, locations: list[SampleLocation], cache: FileCache | None) -> list[bytes | Exception]:
    if cache is None:
        return _fetch_ranges(url, locations)
    blobs: list[bytes | Exception] = [CacheUnavailableError()] * len(locations)
    cached = [p for p, (shard, _) in enumerate(locations) if cache.can_hold(shard.bytes)]
    copies = _fetch_from_files(url, [locations[p] for p in cached], partial(_open_cached, url, cache))
    for p, blob in zip(cached, copies, strict=True):
        blobs[p] = blob
    # Shards larger than the cache, and all of them while its disk is full.
    others = [p for p, blob in enumerate(blobs) if isinstance(blob, CacheUnavailableError)]
    for p, blob in zip(others, _fetch_ranges(url, [locations[p] for p in others]), strict=True):
        blobs[p] = blob
    return blobs


def _fetch_ranges(url: str, locations: list[SampleLocation]) -> list[bytes | Exception]:
    if not locations:
        return []
    fs, root = storage.filesystem(url)
    entries = [shard.entry(index) for shard, index in locations]
    paths = [storage.join(root, shard.name) for shard, _ in locations]
    starts = [entry.offset - _HEADER_BYTES for entry in entries]
    ends = [entry.offset + entry.size for entry in entries]
    blobs = fs.cat_ranges(paths, starts, ends, on_error="return")
    return [
        _strip_header(blob, shard, entry) for blob, (shard, _), entry in zip(blobs, locations, entries, strict=True)
    ]


def _fetch_from_files(
    url: str, locations: Sequence[SampleLocation], open_shard: Callable[[Shard], IO[bytes]]
) -> list[bytes | Exception]:
    """Read files from local files of shards, each opened once and read from front to back."""
    blobs: list[bytes | Exception] = [b""] * len(locations)
    by_shard: dict[str, list[int]] = {}
    for position, (shard, _) in enumerate(locations):
        by_shard.setdefault(shard.name, []).append(position)

    def read_shard(positions: list[int]) -> None:
        shard = locations[positions[0]][0]
        entries = {position: shard.entry(locations[position][1]) for position in positions}
        try:
            with open_shard(shard) as file:
                for position in sorted(positions, key=lambda p: entries[p].offset):
                    entry = entries[position]
                    file.seek(entry.offset - _HEADER_BYTES)
                    blobs[position] = _strip_header(file.read(_HEADER_BYTES + entry.size) or b"", shard, entry)
        except (OSError, ValueError) as error:
            for position in positions:
                blobs[position] = error

    _map_remote(read_shard, list(by_shard.values()), url)
    return blobs


def _map_remote(function: Callable[[Any], _Value], items: list[Any], url: str) -> list[_Value]:
    """Apply a function to each item, with threads if it waits for remote storage."""
    if storage.is_local(url) or len(items) < 2:
        return list(map(function, items))
    with ThreadPoolExecutor(min(_MAX_OPEN_THREADS, len(items)), thread_name_prefix="open-shards") as pool:
        return list(pool.map(function, items))


def _open_local(url: str, shard: Shard) -> IO[bytes]:
    _, root = storage.filesystem(url)
    return open(storage.join(root, shard.name), "rb", buffering=0)


def _open_cached(url: str, cache: FileCache, shard: Shard) -> IO[bytes]:
    def open_local(path: str) -> IO[bytes]:
        return open(path, "rb", buffering=0)

    return cache.open(storage.join(url, shard.name), shard.digest, shard.bytes, open_local)


def _strip_header(data: bytes | Exception, shard: Shard, entry: SampleEntry) -> bytes | Exception:
    """Return the file without its tar header; return an error if the header does not match the manifest."""
    if isinstance(data, Exception) or len(data) <= _HEADER_BYTES:
        return data if isinstance(data, Exception) else b""
    try:
        header = tarfile.TarInfo.frombuf(data[:_HEADER_BYTES], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return ValueError("the shard does not match the manifest")
    if header.size != entry.size or not _can_have_name(header.name, shard, entry):
        return ValueError(f"the shard contains {header.name} at this offset")
    return data[_HEADER_BYTES:]


def _can_have_name(name: str, shard: Shard, entry: SampleEntry) -> bool:
    """Return True if a name in a tar header can be that of a sample, or of the sample that it is a link to."""
    # Names that do not fit into the header are stored in an extension record.
    if len(name) >= tarfile.LENGTH_NAME or _can_have_key(name, entry.key):
        return True
    # Searched only for links, because the search takes time in the number of samples of the shard.
    return any(_can_have_key(name, key) for key in shard.keys_at(entry.offset))


def _can_have_key(name: str, key: str) -> bool:
    # A name that is not ASCII, or in whose key a backslash escapes bytes, is in an extension record.
    return not key.isascii() or "\\" in key or is_member_of(name, key)


def check_shard(shard: Shard, content: ShardContent, url: str) -> None:
    """Check every sample of a new manifest entry as it will be checked when it is read.

    Raises:
        ValueError: a sample cannot be read at its offset.
    """
    for index in range(shard.num_samples):
        entry = shard.entry(index)
        blob = _strip_header(content.read(entry.offset - _HEADER_BYTES, _HEADER_BYTES + 1), shard, entry)
        if isinstance(blob, Exception):
            raise ValueError(f"{url}: {entry.key} cannot be read back: {blob}; write the shard again")


class ShardFiles:
    """Files of a batch of samples, opened one at a time.

    Small remote files are fetched together in one request. Local and large files are read on demand, only the
    requested bytes.

    Args:
        url: folder of the data set.
        locations: from `locate_samples`.
        timeout_s, on_retry, cache: see `fetch_encoded`.
    """

    def __init__(
        self,
        url: str,
        locations: Sequence[SampleLocation],
        timeout_s: float = 0.0,
        on_retry: _OnRetry = _ignore_retry,
        cache: FileCache | None = None,
    ) -> None:
        self.url, self._timeout_s, self._on_retry, self._cache = url, timeout_s, on_retry, cache
        self._blobs: dict[tuple[str, int], bytes | Exception] = {}
        if storage.is_local(url):
            return
        small = {
            (shard.name, index): (shard, index)
            for shard, index in locations
            if shard.entry(index).size <= _SMALL_FILE_BYTES and not self._is_cached(shard)
        }
        self._blobs = dict(zip(small, fetch_located(url, list(small.values()), timeout_s, on_retry), strict=True))

    def _is_cached(self, shard: Shard) -> bool:
        return self._cache is not None and self._cache.can_hold(shard.bytes)

    @contextmanager
    def open(self, shard: Shard, index: int) -> Iterator[IO[bytes]]:
        """Open the file of a sample.

        Raises:
            ValueError: the file cannot be fetched, or the shard is truncated; the message gives the reason.
        """
        blob, entry = self._blobs.get((shard.name, index)), shard.entry(index)
        if blob is not None:
            yield io.BytesIO(check_length(blob, entry.size))
            return
        url = storage.join(self.url, shard.name)
        with ExitStack() as stack:
            file = self._retry(url, lambda: stack.enter_context(self._open_shard(url, shard)))
            num_available = self._retry(url, lambda: file.seek(0, io.SEEK_END)) - entry.offset
            if num_available < entry.size:
                raise ValueError(f"the shard ends after {max(0, num_available)} of the {entry.size} bytes of this file")

            def read(offset: int, count: int) -> bytes:
                file.seek(entry.offset + offset)
                return bytes(file.read(count))

            reader = _RangeReader(entry.size, lambda offset, count: self._retry(url, lambda: read(offset, count)))
            yield io.BufferedReader(reader)

    def _open_shard(self, url: str, shard: Shard) -> AbstractContextManager[IO[bytes]]:
        if self._cache is not None and self._is_cached(shard) and not storage.is_local(url):
            with suppress(CacheUnavailableError):
                return _open_cached(self.url, self._cache, shard)
        return storage.open_url(url)

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
        short_side: size for scaled decoding of JPEGs, see `load_image`.

    Raises:
        ValueError: the file could not be fetched, is truncated, or is not an image; the message gives the reason.
    """
    return decode_image(check_length(blob, size), short_side)
