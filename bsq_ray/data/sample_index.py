"""The index of a shard: key, label, offset and size of each sample, as an Arrow file next to the tar.

    shard-000000.tar      the samples
    shard-000000.arrow    one row per sample; memory-mapped, so a reader loads only the rows that it uses

An index of a remote data set is copied to a local folder first. A process keeps few indexes open.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from bsq_ray import storage
from bsq_ray.data.file_cache import CacheUnavailableError, FileCache
from bsq_ray.media.video_reader import VideoInfo

_VIDEO_TYPE = pa.struct(
    {
        "frames": pa.int64(),
        "fps": pa.float64(),
        "width": pa.int64(),
        "height": pa.int64(),
        "key_frames": pa.list_(pa.int64()),
        "key_times": pa.list_(pa.int64()),
    }
)
_COLUMNS = {"key": pa.string(), "label": pa.int64(), "offset": pa.int64(), "size": pa.int64()}
# Memory maps of indexes that a process keeps open.
_MAX_OPEN_INDEXES = 256
# Copies of remote indexes, all data sets together.
_INDEX_CACHE_BYTES = 4 * 2**30


@dataclass(frozen=True)
class SampleEntry:
    """A sample of a shard.

    Attributes:
        key: name.
        label: class index.
        offset, size: position and size of the image or video in the file, bytes.
    """

    key: str
    label: int
    offset: int
    size: int


@dataclass(frozen=True)
class ShardRow:
    """Row of a manifest.

    Attributes:
        name: file name of the tar inside the data set's folder.
        bytes: size of the tar.
        digest: SHA-256 that identifies the content, see `Manifest`.
        num_samples: number of samples.
        index_bytes: size of the index.
        num_frames: frames of each video, int32 (samples,); empty in a data set of images.
    """

    name: str
    bytes: int
    digest: str
    num_samples: int
    index_bytes: int
    num_frames: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))


@dataclass(frozen=True)
class Shard:
    """One tar file of samples.

    Attributes:
        name: file name inside the data set's folder.
        bytes: size of the file.
        digest: SHA-256 that identifies the content, see `Manifest`.
        rows: one row per sample: key, label, offset, size, and for videos `video`.
    """

    name: str
    bytes: int
    digest: str
    rows: pa.RecordBatch

    @property
    def num_samples(self) -> int:
        """Number of samples."""
        return int(self.rows.num_rows)

    def entry(self, index: int) -> SampleEntry:
        """Return one sample; nothing else of the index is read."""
        keys, labels, offsets, sizes = self._columns
        return SampleEntry(keys[index].as_py(), int(labels[index]), int(offsets[index]), int(sizes[index]))

    def key(self, index: int) -> str:
        """Return the name of one sample."""
        return str(self._columns[0][index].as_py())

    def keys_at(self, offset: int) -> list[str]:
        """Return the names of the samples at an offset: a sample, and links to it."""
        keys, _, offsets, _ = self._columns
        return [str(keys[index].as_py()) for index in np.flatnonzero(offsets == offset).tolist()]

    def video(self, index: int) -> VideoInfo:
        """Return the facts about the video of one sample."""
        return _to_video_info(self.rows.column("video")[index].as_py())

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of all samples, in the order of the tar."""
        return tuple(self.rows.column("key").to_pylist())

    @property
    def labels(self) -> tuple[int, ...]:
        """Class of each sample, an index into the manifest's classes."""
        return tuple(self.rows.column("label").to_pylist())

    @cached_property
    def _columns(self) -> tuple[pa.Array, np.ndarray, np.ndarray, np.ndarray]:
        labels, offsets, sizes = (self.rows.column(name).to_numpy() for name in ("label", "offset", "size"))
        return self.rows.column("key"), labels, offsets, sizes


def _to_video_info(video: dict[str, Any]) -> VideoInfo:
    return VideoInfo(**{**video, "key_frames": tuple(video["key_frames"]), "key_times": tuple(video["key_times"])})


def index_rows(entries: list[SampleEntry], videos: list[VideoInfo] | None = None) -> pa.RecordBatch:
    """Return the rows of an index; `videos` has the facts about each sample of a data set of videos."""
    columns = {name: [getattr(entry, name) for entry in entries] for name in _COLUMNS}
    arrays = {name: pa.array(columns[name], kind) for name, kind in _COLUMNS.items()}
    if videos is not None:
        arrays["video"] = pa.array([asdict(video) for video in videos], _VIDEO_TYPE)
    return pa.RecordBatch.from_pydict(arrays)


def with_labels(shard: Shard, labels: Sequence[int]) -> Shard:
    """Return the shard with other labels."""
    column = shard.rows.schema.get_field_index("label")
    return replace(shard, rows=shard.rows.set_column(column, "label", pa.array(labels, pa.int64())))


def with_digest(shard: Shard, digest: str) -> Shard:
    """Return the shard with a digest."""
    return replace(shard, digest=digest)


def shard_row(shard: Shard, index_bytes: int) -> ShardRow:
    """Return the row of a shard in the manifest."""
    num_frames = np.empty(0, np.int32)
    if "video" in shard.rows.schema.names:
        num_frames = shard.rows.column("video").field("frames").to_numpy().astype(np.int32)
    return ShardRow(shard.name, shard.bytes, shard.digest, shard.num_samples, index_bytes, num_frames)


def index_digest(rows: pa.RecordBatch) -> str:
    """Return the SHA-256 of keys, labels, offsets and sizes."""
    digest = hashlib.sha256("\n".join(rows.column("key").to_pylist()).encode("utf-8", "surrogateescape"))
    for name in ("label", "offset", "size"):
        digest.update(rows.column(name).to_numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def index_url(url: str, shard_name: str) -> str:
    """Return the file of a shard's index, for the shards in the folder `url`."""
    return storage.join(url, shard_name.removesuffix(".tar") + ".arrow")


def write_index(url: str, shard: Shard, facts: dict[str, Any] | None = None) -> int:
    """Write the index of a shard in one step; return its size in bytes.

    Args:
        url: folder of the shards.
        shard: the shard; its tar must exist already.
        facts: JSON values that are stored with the index.
    """
    metadata = {"name": shard.name, "bytes": shard.bytes, "digest": shard.digest, **(facts or {})}
    rows = shard.rows.replace_schema_metadata({"bsq_ray": json.dumps(metadata)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, rows.schema) as writer:
        writer.write_batch(rows)
    content = sink.getvalue()
    storage.write_bytes(index_url(url, shard.name), content.to_pybytes())
    return int(content.size)


def read_index(url: str, shard_name: str) -> tuple[Shard, dict[str, Any], int] | None:
    """Read the index of a shard, the facts stored with it, and its size; return None if it is missing or damaged."""
    path = index_url(url, shard_name)
    if not storage.exists(path):
        return None
    content = storage.read_bytes(path)
    try:
        return (*_parse_index(pa.BufferReader(content)), len(content))
    except (pa.ArrowException, KeyError, TypeError, ValueError):
        return None


def _parse_index(file: pa.NativeFile) -> tuple[Shard, dict[str, Any]]:
    reader = pa.ipc.open_file(file)
    facts = json.loads(reader.schema.metadata[b"bsq_ray"])
    rows = reader.get_batch(0)
    for name, kind in _COLUMNS.items():
        if rows.schema.field(name).type != kind:
            raise TypeError(f"column {name} is not {kind}")
    return Shard(facts.pop("name"), facts.pop("bytes"), facts.pop("digest"), rows), facts


class IndexCache:
    """Open indexes of this process, by data set and shard; the least recently used are closed."""

    def __init__(self, max_open: int = _MAX_OPEN_INDEXES) -> None:
        self._max_open = max_open
        self._shards: OrderedDict[tuple[str, str, str], Shard] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, url: str, row: ShardRow) -> Shard:
        """Return a shard.

        Args:
            url: folder of the data set.
            row: row of the manifest.

        Raises:
            StorageUnavailableError: the storage is unavailable.
            ValueError: the index is missing, damaged, or not the one of the manifest.
        """
        cache_key = (url, row.name, row.digest)
        with self._lock:
            if cache_key in self._shards:
                self._shards.move_to_end(cache_key)
                return self._shards[cache_key]
        path = index_url(url, row.name)
        try:
            indexed, _ = _open_index(path, row)
        except storage.StorageUnavailableError:
            raise
        except (pa.ArrowException, KeyError, TypeError, ValueError, OSError) as error:
            raise ValueError(
                f"{path} cannot be used: {' '.join(str(error).split())}; write it with `bsq-ray data index {url}`"
            ) from error
        if (indexed.digest, indexed.num_samples) != (row.digest, row.num_samples):
            raise ValueError(f"{path} is not the index of the manifest; write both with `bsq-ray data index {url}`")
        # The index may be a copy under another name.
        shard = Shard(row.name, row.bytes, row.digest, indexed.rows)
        with self._lock:
            self._shards[cache_key] = shard
            while len(self._shards) > self._max_open:
                self._shards.popitem(last=False)
        return shard


OPEN_INDEXES = IndexCache()


def _memory_map(path: str) -> pa.MemoryMappedFile:
    # Arrow encodes strings as UTF-8, but names of files need not be UTF-8.
    return pa.memory_map(os.fsencode(path))


def _open_index(url: str, row: ShardRow) -> tuple[Shard, dict[str, Any]]:
    if storage.is_local(url):
        _, path = storage.filesystem(url)
        return _parse_index(_memory_map(path))
    # Imported here because commands that only describe a data set start without torch.
    from bsq_ray.models.pretrained_weights import cache_folder

    cache = FileCache(str(cache_folder("indexes")), _INDEX_CACHE_BYTES)
    if cache.can_hold(row.index_bytes):
        # Without a writable folder the index is read into memory.
        with suppress(CacheUnavailableError):
            return _parse_index(cache.open(url, row.digest, row.index_bytes, _memory_map))
    return _parse_index(pa.BufferReader(storage.read_bytes(url)))
