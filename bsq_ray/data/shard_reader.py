"""Reading samples out of shards: ranged reads, decoding in place, and what happens to damaged ones.

Shape suffixes: P samples, C channels, H and W pixels.
"""

from __future__ import annotations

import io
import posixpath
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import IO, TypeVar

import numpy as np
from PIL import Image

from bsq_ray import storage
from bsq_ray.data.data_source import SampleBlock
from bsq_ray.data.manifest import Manifest, Shard
from bsq_ray.data.transforms import DECODE_ERRORS, decode_error_text, decode_image

# Files up to this size are fetched whole, bytes.
_SMALL = 4 * 2**20
_SampleLocation = tuple[Shard, int]
_HEADER = tarfile.BLOCKSIZE
_Value = TypeVar("_Value")


def read_samples(
    manifest: Manifest,
    samples: Sequence[int],
    short_side: int | None,
    transform: Callable[[Image.Image, int], np.ndarray],
    timeout_s: float = 0.0,
) -> SampleBlock:
    """Reads, decodes and transforms samples, in the given order.

    A damaged sample is replaced by the next readable one of its shard, so that batches stay full whoever reads them.

    Args:
        manifest: the data set.
        samples: numbers of the samples through all shards.
        short_side: what JPEGs may be decoded towards, see `decode_image`.
        transform: called with the RGB image and the place in `samples`; returns uint8 (3, H, W).
        patience: seconds for which storage may fail before what lies there counts as damaged.

    Raises:
        RuntimeError: no sample of a shard can be read.
    """
    block = SampleBlock(np.empty(0, np.uint8), np.empty(0, np.int64), [])
    images, labels = [], []
    blobs = fetch_encoded(manifest, samples, timeout_s, block.retries.append)
    for position, sample in enumerate(samples):
        shard, index = manifest.locate(sample)
        image, index = _first_readable(manifest, shard, index, blobs[position], short_side, block.skipped)
        images.append(transform(image, position))
        labels.append(shard.labels[index])
        block.keys.append(shard.keys[index])
    block.values_P, block.labels_P = np.stack(images), np.array(labels, np.int64)
    return block


def fetch_encoded(
    manifest: Manifest, samples: Iterable[int], timeout_s: float = 0.0, on_retry: Callable[[str], None] = lambda _: None
) -> list[bytes | Exception]:
    """The image files of samples; an exception stands where one could not be read.

    Args:
        patience: seconds for which remote storage may fail, while it is asked again.
        say: hears of each failure that is followed by another try.
    """
    locations = [manifest.locate(sample) for sample in samples]
    if storage.is_local(manifest.url):
        return _fetch_local(manifest.url, locations)
    blobs: list[bytes | Exception] = [storage.StorageUnavailableError()] * len(locations)

    def fetch_missing() -> None:
        """Asks for what has not come yet."""
        missing = [p for p, blob in enumerate(blobs) if isinstance(blob, Exception) and storage.is_transient(blob)]
        for p, blob in zip(missing, _fetch_remote(manifest.url, [locations[p] for p in missing]), strict=True):
            blobs[p] = blob
        for p in missing:
            blob = blobs[p]
            if isinstance(blob, Exception) and storage.is_transient(blob):
                with storage.translate_errors(storage.join(manifest.url, locations[p][0].name), "read"):
                    raise blob

    # What has not come by then is handled as damaged.
    with suppress(storage.StorageUnavailableError):
        storage.retry_while_unavailable(fetch_missing, timeout_s, on_retry)
    return blobs


def _fetch_remote(url: str, locations: list[_SampleLocation]) -> list[bytes | Exception]:
    fs, root = storage.filesystem(url)
    paths = [storage.join(root, shard.name) for shard, _ in locations]
    starts = [shard.offsets[index] - _HEADER for shard, index in locations]
    ends = [shard.offsets[index] + shard.sizes[index] for shard, index in locations]
    blobs = fs.cat_ranges(paths, starts, ends, on_error="return")
    return [_strip_header(blob, *place) for blob, place in zip(blobs, locations, strict=True)]


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
                    file.seek(shard.offsets[index] - _HEADER)
                    blobs[position] = _strip_header(file.read(_HEADER + shard.sizes[index]) or b"", shard, index)
        except OSError as error:
            for position in shard_positions:
                blobs[position] = error
    return blobs


def _strip_header(data: bytes | Exception, shard: Shard, index: int) -> bytes | Exception:
    """A file without its tar header, which is looked at: in a shard that was changed another file lies in its place."""
    if isinstance(data, Exception) or len(data) <= _HEADER:
        return data if isinstance(data, Exception) else b""
    try:
        header = tarfile.TarInfo.frombuf(data[:_HEADER], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return ValueError("its shard is not the one that the manifest speaks of")
    # Names that do not fit the header stand elsewhere.
    is_full_name = len(header.name) < tarfile.LENGTH_NAME and header.name.isascii() and "?" not in header.name
    key = posixpath.basename(header.name).partition(".")[0]
    if header.size != shard.sizes[index] or (is_full_name and key != shard.keys[index]):
        return ValueError(f"{header.name} lies in its place")
    return data[_HEADER:]


class ShardFiles:
    """The files of some samples, to be opened one at a time: in memory never lies more than what is being read.

    On this machine and for large files only the bytes that are asked for are read; small ones that lie elsewhere come
    together in one request.

    Args:
        manifest: the data set.
        places: shard, and place in it, of each sample.
        patience, say: see `fetch`.
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
        small = {(shard.name, index) for shard, index in locations if shard.sizes[index] <= _SMALL}
        samples = {place: shard_starts[place[0]] + place[1] for place in sorted(small)}
        self._blobs = dict(zip(samples, fetch_encoded(manifest, samples.values(), timeout_s, on_retry), strict=True))

    @contextmanager
    def open(self, shard: Shard, index: int) -> Iterator[IO[bytes]]:
        """The file of a sample.

        Raises:
            ValueError: it cannot be fetched, or the shard is cut off; the message gives the reason.
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
                raise ValueError(f"the shard ends after {max(0, num_available)} of its {size} bytes")

            def read(offset: int, count: int) -> bytes:
                file.seek(shard.offsets[index] + offset)
                return bytes(file.read(count))

            reader = _RangeReader(size, lambda place, count: self._retry(url, lambda: read(place, count)))
            yield io.BufferedReader(reader)

    def _retry(self, url: str, operation: Callable[[], _Value]) -> _Value:
        def attempt() -> _Value:
            with storage.translate_errors(url, "read"):
                return operation()

        return storage.retry_while_unavailable(attempt, self._timeout_s, self._on_retry)


class _RangeReader(io.RawIOBase):
    """A part of a file as a file; `read` gives so many bytes from a place in it."""

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
    """A fetched file, whose manifest says it has `size` bytes.

    Raises:
        ValueError: it could not be fetched, or is cut off.
    """
    if isinstance(blob, Exception):
        raise ValueError(f"cannot be read: {' '.join(str(blob).split())}")
    if len(blob) != size:
        raise ValueError(f"the shard ends after {len(blob)} of its {size} bytes")
    return blob


def decode_blob(blob: bytes | Exception, size: int, short_side: int | None) -> Image.Image:
    """Decodes a fetched file, whose manifest says it has `size` bytes.

    Raises:
        ValueError: it could not be fetched, is cut off, or is not an image; the message gives the reason.
    """
    data = check_length(blob, size)
    try:
        return decode_image(data, short_side)
    except DECODE_ERRORS as error:
        raise ValueError(decode_error_text(error)) from error


def _first_readable(
    manifest: Manifest,
    shard: Shard,
    index: int,
    blob: bytes | Exception,
    short_side: int | None,
    skipped: list[str],
) -> tuple[Image.Image, int]:
    start = int(manifest.shard_starts[manifest.shards.index(shard)])
    for step in range(len(shard.keys)):
        candidate = (index + step) % len(shard.keys)
        if step:
            [blob] = fetch_encoded(manifest, [start + candidate])
        try:
            return decode_blob(blob, shard.sizes[candidate], short_side), candidate
        except ValueError as error:
            skipped.append(f"{shard.name}: {shard.keys[candidate]}: {error}")
    raise RuntimeError(f"no sample of {storage.join(manifest.url, shard.name)} can be read; first: {skipped[0]}")
