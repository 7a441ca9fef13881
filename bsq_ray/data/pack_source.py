"""The files to pack, as columns, and how a task reads one of them.

    folder ─▶ files          .tar, tar of tars, WebDataset shards ─▶ byte ranges          Parquet ─▶ rows

Shape suffixes: F files.
"""

from __future__ import annotations

import posixpath
import re
import threading
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bsq_ray import storage
from bsq_ray.data.file_list import decode_name
from bsq_ray.data.file_ranges import read_range
from bsq_ray.runtime.random_streams import RandomStream, stream_rng

# Row groups that a reading process keeps decoded. The files of one follow each other in the plan.
_MAX_ROW_GROUPS = 2
_ROW_GROUP_LOCK = threading.Lock()


@dataclass(frozen=True)
class FileSource:
    """A file to pack, as it is sent to a task.

    Attributes:
        url: file to read, or the file that contains it.
        name: URL, or name in the file that contains it, for reports.
        key: key in the data set.
        label: class index.
        size: bytes; estimated in a Parquet file.
        offset: position in a tar; None elsewhere.
        row_group, column: row group and column of a Parquet file; None and empty elsewhere.
        row: row in the row group.
    """

    url: str
    name: str
    key: str
    label: int
    size: int
    offset: int | None = None
    row_group: int | None = None
    column: str = ""
    row: int = 0


@dataclass(frozen=True)
class SourceFiles:
    """All files to pack, without a Python object for each.

    Attributes:
        names: URLs of files without `prefix`, or names inside of containers; as bytes, see `FileList`.
        labels_F: class of each file, int32 (F,).
        sizes_F: bytes, int64 (F,); estimated in Parquet files.
        classes: names of the labels.
        containers: URLs of tars or Parquet files; empty if the names are URLs.
        container_F: container of each file, int32 (F,).
        offsets_F: position in the tar, or number of the row in its row group, int64 (F,).
        row_group_F: row group, int32 (F,); empty if there are none.
        column: column of the images in Parquet files.
        prefix: what comes before each name in its URL.
    """

    names: pa.Array
    labels_F: np.ndarray
    sizes_F: np.ndarray
    classes: tuple[str, ...]
    containers: tuple[str, ...] = ()
    container_F: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    offsets_F: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    row_group_F: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    column: str = ""
    prefix: str = ""

    def __len__(self) -> int:
        return len(self.names)

    def shuffled(self, seed: int) -> np.ndarray:
        """Return the numbers of the files in random order; rows of one row group stay together."""
        rng = stream_rng(RandomStream.PACK_ORDER, seed)
        if not len(self.row_group_F):
            return rng.permutation(len(self))
        group_F = self.container_F.astype(np.int64) * (int(self.row_group_F.max()) + 1) + self.row_group_F
        groups, inverse_F = np.unique(group_F, return_inverse=True)
        # Inside a row group the order is random, too.
        return np.lexsort((rng.permutation(len(self)), rng.permutation(len(groups))[inverse_F]))

    def file(self, number: int) -> FileSource:
        """Return one file."""
        name = self.prefix + decode_name(self.names[number].as_py())
        slug = re.sub(r"[^A-Za-z0-9_-]+", "_", posixpath.splitext(posixpath.basename(name))[0])[:40]
        key, label, size = f"{number:08d}_{slug}", int(self.labels_F[number]), int(self.sizes_F[number])
        if not self.containers:
            return FileSource(name, name, key, label, size)
        url, offset = self.containers[self.container_F[number]], int(self.offsets_F[number])
        if not len(self.row_group_F):
            return FileSource(url, f"{url}: {name}", key, label, size, offset=offset)
        group = int(self.row_group_F[number])
        return FileSource(url, f"{url}: {name}", key, label, size, row_group=group, column=self.column, row=offset)


def read_source(source: FileSource) -> bytes:
    """Read a file to pack.

    Raises:
        StorageUnavailableError: the storage is unavailable.
        ValueError: the file is missing, or its row is empty.
    """
    if source.row_group is not None:
        # Threads that need the same row group wait for the one that decodes it.
        with _ROW_GROUP_LOCK:
            column = _read_image_column(source.url, source.row_group, source.column)
        value = column[source.row].as_py()
        if value is None:
            raise ValueError("the row has no image")
        return bytes(value)
    if source.offset is not None:
        return read_range(source.url, source.offset, source.size)
    return storage.read_bytes(source.url)


@lru_cache(_MAX_ROW_GROUPS)
def _read_image_column(url: str, row_group: int, column: str) -> pa.Array:
    with storage.open_url(url) as file:
        try:
            table = pq.ParquetFile(file).read_row_group(row_group, [column], use_threads=False)
        except pa.ArrowException as error:
            raise ValueError(f"{url} is damaged: {error}") from error
    values = table.column(0).combine_chunks()
    return values.field("bytes") if pa.types.is_struct(values.type) else values
