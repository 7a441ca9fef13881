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
from bsq_ray.data.data_source import Samples
from bsq_ray.data.manifest import Manifest, Shard
from bsq_ray.data.transforms import DECODE_ERRORS, decode_fault, decode_image

# Files up to this size are fetched whole, bytes.
_SMALL = 4 * 2**20
_Place = tuple[Shard, int]
_HEADER = tarfile.BLOCKSIZE
_Value = TypeVar("_Value")


def read_samples(
    manifest: Manifest,
    samples: Sequence[int],
    short_side: int | None,
    transform: Callable[[Image.Image, int], np.ndarray],
    patience: float = 0.0,
) -> Samples:
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
    result = Samples(np.empty(0, np.uint8), np.empty(0, np.int64), [])
    images, labels = [], []
    blobs = fetch(manifest, samples, patience, result.delays.append)
    for place, sample in enumerate(samples):
        shard, index = manifest.locate(sample)
        image, index = _first_readable(manifest, shard, index, blobs[place], short_side, result.damaged)
        images.append(transform(image, place))
        labels.append(shard.labels[index])
        result.keys.append(shard.keys[index])
    result.values_P, result.labels_P = np.stack(images), np.array(labels, np.int64)
    return result


def fetch(
    manifest: Manifest, samples: Iterable[int], patience: float = 0.0, say: Callable[[str], None] = lambda _: None
) -> list[bytes | Exception]:
    """The image files of samples; an exception stands where one could not be read.

    Args:
        patience: seconds for which remote storage may fail, while it is asked again.
        say: hears of each failure that is followed by another try.
    """
    places = [manifest.locate(sample) for sample in samples]
    if storage.is_local(manifest.url):
        return _fetch_local(manifest.url, places)
    blobs: list[bytes | Exception] = [storage.Unavailable()] * len(places)

    def ask() -> None:
        """Asks for what has not come yet."""
        missing = [p for p, blob in enumerate(blobs) if isinstance(blob, Exception) and storage.may_pass(blob)]
        for p, blob in zip(missing, _fetch_remote(manifest.url, [places[p] for p in missing]), strict=True):
            blobs[p] = blob
        for p in missing:
            blob = blobs[p]
            if isinstance(blob, Exception) and storage.may_pass(blob):
                with storage.explained(storage.join(manifest.url, places[p][0].name), "read"):
                    raise blob

    # What has not come by then is handled as damaged.
    with suppress(storage.Unavailable):
        storage.persistently(ask, patience, say)
    return blobs


def _fetch_remote(url: str, places: list[_Place]) -> list[bytes | Exception]:
    fs, root = storage.filesystem(url)
    paths = [storage.join(root, shard.name) for shard, _ in places]
    starts = [shard.offsets[index] - _HEADER for shard, index in places]
    ends = [shard.offsets[index] + shard.sizes[index] for shard, index in places]
    blobs = fs.cat_ranges(paths, starts, ends, on_error="return")
    return [_content(blob, *place) for blob, place in zip(blobs, places, strict=True)]


def _fetch_local(url: str, places: list[_Place]) -> list[bytes | Exception]:
    _, root = storage.filesystem(url)
    blobs: list[bytes | Exception] = [b""] * len(places)
    by_shard: dict[str, list[int]] = {}
    for place, (shard, _) in enumerate(places):
        by_shard.setdefault(shard.name, []).append(place)
    for name, here in by_shard.items():
        try:
            with open(storage.join(root, name), "rb", buffering=0) as file:
                for place in sorted(here, key=lambda p: places[p][0].offsets[places[p][1]]):
                    shard, index = places[place]
                    file.seek(shard.offsets[index] - _HEADER)
                    blobs[place] = _content(file.read(_HEADER + shard.sizes[index]) or b"", shard, index)
        except OSError as error:
            for place in here:
                blobs[place] = error
    return blobs


def _content(read: bytes | Exception, shard: Shard, index: int) -> bytes | Exception:
    """A file without its tar header, which is looked at: in a shard that was changed another file lies in its place."""
    if isinstance(read, Exception) or len(read) <= _HEADER:
        return read if isinstance(read, Exception) else b""
    try:
        header = tarfile.TarInfo.frombuf(read[:_HEADER], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return ValueError("its shard is not the one that the manifest speaks of")
    # Names that do not fit the header stand elsewhere.
    whole_name = len(header.name) < tarfile.LENGTH_NAME and header.name.isascii() and "?" not in header.name
    key = posixpath.basename(header.name).partition(".")[0]
    if header.size != shard.sizes[index] or (whole_name and key != shard.keys[index]):
        return ValueError(f"{header.name} lies in its place")
    return read[_HEADER:]


class Files:
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
        places: Sequence[_Place],
        patience: float = 0.0,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.url, self._patience, self._say = manifest.url, patience, say
        self._blobs: dict[tuple[str, int], bytes | Exception] = {}
        if storage.is_local(manifest.url):
            return
        numbers = {shard.name: int(start) for shard, start in zip(manifest.shards, manifest.starts[:-1], strict=True)}
        small = {(shard.name, index) for shard, index in places if shard.sizes[index] <= _SMALL}
        samples = {place: numbers[place[0]] + place[1] for place in sorted(small)}
        self._blobs = dict(zip(samples, fetch(manifest, samples.values(), patience, say), strict=True))

    @contextmanager
    def open(self, shard: Shard, index: int) -> Iterator[IO[bytes]]:
        """The file of a sample.

        Raises:
            ValueError: it cannot be fetched, or the shard is cut off; the message gives the reason.
        """
        blob, size = self._blobs.get((shard.name, index)), shard.sizes[index]
        if blob is not None:
            yield io.BytesIO(whole(blob, size))
            return
        url = storage.join(self.url, shard.name)
        with ExitStack() as opened:
            file = self._persistently(url, lambda: opened.enter_context(storage.open_url(url)))
            there = self._persistently(url, lambda: file.seek(0, io.SEEK_END)) - shard.offsets[index]
            if there < size:
                raise ValueError(f"the shard ends after {max(0, there)} of its {size} bytes")

            def read(place: int, count: int) -> bytes:
                file.seek(shard.offsets[index] + place)
                return bytes(file.read(count))

            window = _Window(size, lambda place, count: self._persistently(url, lambda: read(place, count)))
            yield io.BufferedReader(window)

    def _persistently(self, url: str, operation: Callable[[], _Value]) -> _Value:
        def explained() -> _Value:
            with storage.explained(url, "read"):
                return operation()

        return storage.persistently(explained, self._patience, self._say)


class _Window(io.RawIOBase):
    """A part of a file as a file; `read` gives so many bytes from a place in it."""

    def __init__(self, size: int, read: Callable[[int, int], bytes]) -> None:
        self.size, self.fetch, self.place = size, read, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.place = max(0, offset + (0, self.place, self.size)[whence])
        return self.place

    def tell(self) -> int:
        return self.place

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self.fetch(self.place, max(0, min(len(buffer), self.size - self.place)))
        buffer[: len(data)] = data
        self.place += len(data)
        return len(data)


def whole(blob: bytes | Exception, size: int) -> bytes:
    """A fetched file, whose manifest says it has `size` bytes.

    Raises:
        ValueError: it could not be fetched, or is cut off.
    """
    if isinstance(blob, Exception):
        raise ValueError(f"cannot be read: {' '.join(str(blob).split())}")
    if len(blob) != size:
        raise ValueError(f"the shard ends after {len(blob)} of its {size} bytes")
    return blob


def decode(blob: bytes | Exception, size: int, short_side: int | None) -> Image.Image:
    """Decodes a fetched file, whose manifest says it has `size` bytes.

    Raises:
        ValueError: it could not be fetched, is cut off, or is not an image; the message gives the reason.
    """
    data = whole(blob, size)
    try:
        return decode_image(data, short_side)
    except DECODE_ERRORS as error:
        raise ValueError(decode_fault(error)) from error


def _first_readable(
    manifest: Manifest,
    shard: Shard,
    index: int,
    blob: bytes | Exception,
    short_side: int | None,
    damaged: list[str],
) -> tuple[Image.Image, int]:
    start = int(manifest.starts[manifest.shards.index(shard)])
    for step in range(len(shard.keys)):
        candidate = (index + step) % len(shard.keys)
        if step:
            [blob] = fetch(manifest, [start + candidate])
        try:
            return decode(blob, shard.sizes[candidate], short_side), candidate
        except ValueError as error:
            damaged.append(f"{shard.name}: {shard.keys[candidate]}: {error}")
    raise RuntimeError(f"no sample of {storage.join(manifest.url, shard.name)} can be read; first: {damaged[0]}")
