"""The manifest of a packed data set: one row per shard, in `manifest.parquet`.

    manifest.parquet      name, bytes, SHA-256 and number of samples of each shard; a few MB for 100,000 shards
    shard-000000.arrow    the samples of a shard, see `sample_index`; opened when one of them is read
    shard-000000.tar      their content

No Python object per sample or per shard is kept. A pickled manifest is its URL and its hash: a process that receives
it opens the files once.
"""

from __future__ import annotations

import hashlib
import io
import json
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bsq_ray import storage
from bsq_ray.data.packing import Packing, parse_packing
from bsq_ray.data.sample_index import OPEN_INDEXES, Shard, ShardRow
from bsq_ray.runtime.wrong_files import describe_wrong_binary

MANIFEST_FILE = "manifest.parquet"
_VERSION = 2
_COLUMNS = {
    "name": pa.string(),
    "bytes": pa.int64(),
    "sha256": pa.string(),
    "samples": pa.int64(),
    "index_bytes": pa.int64(),
}
_FRAMES_TYPE = pa.list_(pa.int32())
# Manifests that a process keeps open for the data sets it was sent.
_MAX_OPEN_MANIFESTS = 16
# Seconds for which a process that was sent a data set retries unavailable storage.
_OPEN_TIMEOUT_S = 600.0


@dataclass(frozen=True, eq=False)
class Manifest:
    """A packed data set.

    Attributes:
        url: folder of the shards.
        rows: one row per shard.
        classes: names of the labels.
        kind: "images" or "videos".
        has_content_digests: True if `sha256` of a shard is that of the whole file, False if it is that of its index.
        hash: SHA-256 of the shards' names, digests and order, by which results identify the data set.
        packing: how packing changed the files; None for shards that another program made.
    """

    url: str
    rows: pa.Table
    classes: tuple[str, ...]
    kind: str
    has_content_digests: bool
    hash: str
    packing: Packing | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_reference, (self.url, self.hash)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Manifest):
            return NotImplemented
        same = (self.url, self.hash, self.classes, self.kind) == (other.url, other.hash, other.classes, other.kind)
        return same and bool(self.rows.equals(other.rows))

    def __hash__(self) -> int:
        return hash((self.url, self.hash))

    @cached_property
    def shard_sizes(self) -> np.ndarray:
        """Number of samples of each shard, int64 (shards,)."""
        return np.asarray(self.rows["samples"].to_numpy(), np.int64)

    @cached_property
    def shard_starts(self) -> np.ndarray:
        """Number of samples before each shard, and the total last; int64 (shards + 1,)."""
        return np.concatenate([[0], np.cumsum(self.shard_sizes)]).astype(np.int64)

    @cached_property
    def num_frames(self) -> np.ndarray:
        """Number of frames of each video, int32 (samples,); empty in a data set of images."""
        if self.kind == "images":
            return np.empty(0, np.int32)
        return np.asarray(self.rows["frames"].combine_chunks().flatten().to_numpy(), np.int32)

    @property
    def num_samples(self) -> int:
        """Samples of all shards together."""
        return int(self.shard_starts[-1])

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return int(self.rows.num_rows)

    @property
    def num_bytes(self) -> int:
        """Size of all shards together."""
        return int(self.rows["bytes"].to_numpy().sum())

    @property
    def shards(self) -> Sequence[Shard]:
        """All shards; each is opened when it is accessed."""
        return _ShardSequence(self)

    def shard_name(self, number: int) -> str:
        """Return the file name of a shard, without opening its index."""
        return str(self.rows["name"][number].as_py())

    def shard_row(self, number: int) -> ShardRow:
        """Return the row of a shard, without the frames of its videos."""
        return ShardRow(*(self.rows[name][number].as_py() for name in _COLUMNS))

    def shard(self, number: int) -> Shard:
        """Open a shard, or return it if this process has it open.

        Raises:
            StorageUnavailableError: the storage is unavailable.
            ValueError: the index is missing, damaged, or not the one of the manifest.
        """
        return OPEN_INDEXES.get(self.url, self.shard_row(number))

    def locate(self, sample: int) -> tuple[Shard, int]:
        """Return the shard of a sample (numbered through all shards), and its index in the shard."""
        number = int(np.searchsorted(self.shard_starts, sample, side="right")) - 1
        return self.shard(number), int(sample - self.shard_starts[number])

    def shard_numbers(self, samples_P: np.ndarray) -> np.ndarray:
        """Return the number of the shard of each sample, int64 (P,)."""
        return np.searchsorted(self.shard_starts, samples_P, side="right") - 1


class _ShardSequence(Sequence[Shard]):
    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest

    def __len__(self) -> int:
        return self._manifest.num_shards

    @overload
    def __getitem__(self, number: int) -> Shard: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[Shard]: ...
    def __getitem__(self, number: int | slice) -> Shard | Sequence[Shard]:
        if isinstance(number, slice):
            return [self._manifest.shard(n) for n in range(*number.indices(len(self)))]
        return self._manifest.shard(range(len(self))[number])

    def __iter__(self) -> Iterator[Shard]:
        return (self._manifest.shard(number) for number in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(Shard.__eq__, self, other))

    __hash__ = None  # type: ignore[assignment]


@lru_cache(_MAX_OPEN_MANIFESTS)
def _open_reference(url: str, expected_hash: str) -> Manifest:
    """Open the manifest that another process sent to this one."""
    manifest = storage.retry_while_unavailable(lambda: read_manifest(url), _OPEN_TIMEOUT_S, lambda _: None)
    if manifest.hash != expected_hash:
        raise ValueError(
            f"{url} changed while it was used (hash {expected_hash[:12]}, now {manifest.hash[:12]}); "
            "start again with the new data set"
        )
    return manifest


def read_manifest(url: str) -> Manifest:
    """Read the manifest of a packed data set; the time does not depend on the number of samples.

    Raises:
        ValueError: the folder has no manifest, or it is damaged or of another version.
    """
    path = storage.join(url, MANIFEST_FILE)
    if not storage.exists(path):
        raise ValueError(
            f"{url} is not a packed data set: it has no {MANIFEST_FILE}. "
            f"Pack a folder of images or videos with `bsq-ray data pack FOLDER {url}`, or index existing shards with "
            f"`bsq-ray data index {url}`"
        )
    content, version = storage.read_bytes(path), _VERSION
    try:
        # The threads of pq.read_table can abort the process at its end.
        file = pq.ParquetFile(io.BytesIO(content), pre_buffer=False)
        metadata = json.loads((file.schema_arrow.metadata or {})[b"bsq_ray"])
        version = metadata["version"]
        if version == _VERSION:
            classes, kind = tuple(metadata["classes"]), metadata["kind"]
            packing = parse_packing(metadata.get("packing"))
            rows = _check_rows(file.read(use_threads=False), kind)
            return Manifest(url, rows, classes, kind, metadata["digests"] == "content", metadata["hash"], packing)
        is_newer = version > _VERSION
    except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
        description = describe_wrong_binary(content) or f"is damaged or not a manifest of bsq_ray: {error}"
        raise ValueError(f"{path} {description}") from error
    if is_newer:
        raise ValueError(f"{path} was written by a newer version of bsq_ray; update it to read this data set")
    raise ValueError(f"{path} was written by an older version of bsq_ray; run `bsq-ray data index {url}` again")


def _check_rows(rows: pa.Table, kind: str) -> pa.Table:
    columns = {**_COLUMNS, **({"frames": _FRAMES_TYPE} if kind == "videos" else {})}
    if missing := columns.keys() - set(rows.schema.names):
        raise ValueError(f"it has no column {min(missing)}")
    return rows.select(list(columns)).cast(pa.schema(columns)).combine_chunks().replace_schema_metadata(None)


def _check_shards_exist(url: str, shards: Sequence[ShardRow]) -> None:
    """Look for every shard at the place that the manifest names, with one listing of each folder."""
    folders = {posixpath.dirname(shard.name) for shard in shards}
    sizes = {
        posixpath.join(folder, name): size
        for folder in folders
        for name, size in storage.file_sizes(storage.join(url, folder) if folder else url).items()
    }
    missing = [shard.name for shard in shards if sizes.get(shard.name) != shard.bytes]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(shards)} shards are not in {url}, such as {missing[0]}; "
            "if nodes of a cluster wrote them, use a folder that all nodes share"
        )


def write_manifest(
    url: str,
    shards: Sequence[ShardRow],
    classes: Sequence[str],
    kind: str,
    *,
    has_content_digests: bool,
    packing: Packing | None = None,
) -> Manifest:
    """Write `manifest.parquet` in one step and return it; the shards and their indexes must exist already.

    Args:
        url: folder of the shards.
        shards: their rows, in the order of the data set.
        classes: names of the labels.
        kind: "images" or "videos".
        has_content_digests, packing: see `Manifest`.

    Raises:
        ValueError: a shard is not in the folder, or has another size.
    """
    _check_shards_exist(url, shards)
    attributes = {"sha256": "digest", "samples": "num_samples"}
    columns = {
        name: pa.array([getattr(shard, attributes.get(name, name)) for shard in shards], column_type)
        for name, column_type in _COLUMNS.items()
    }
    if kind == "videos":
        columns["frames"] = pa.array([shard.num_frames for shard in shards], _FRAMES_TYPE)
    rows = pa.table(columns)
    names_and_digests = json.dumps([[shard.name, shard.digest] for shard in shards])
    data_hash = hashlib.sha256(names_and_digests.encode()).hexdigest()
    metadata = {
        "version": _VERSION,
        "classes": list(classes),
        "kind": kind,
        "digests": "content" if has_content_digests else "index",
        "hash": data_hash,
        "packing": None if packing is None else asdict(packing),
    }
    buffer = io.BytesIO()
    pq.write_table(rows.replace_schema_metadata({"bsq_ray": json.dumps(metadata)}), buffer, compression="zstd")
    storage.write_bytes(storage.join(url, MANIFEST_FILE), buffer.getvalue())
    return Manifest(url, rows, tuple(classes), kind, has_content_digests, data_hash, packing)
