"""Token tables: the tokens of a data set as Parquet, written once by `tokenize` and read by the token models.

tokens.json             metadata of the table; written last, so a table with this file is complete
part-000000.parquet     one part per shard: key, label, view, shape (t, h, w), bits (packed bits of all tokens)
tokenizer/              model folder of the tokenizer, which decodes the tokens

Shape suffixes: P rows, N tokens of a row, L bits of a token, B bytes of a row.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bsq_ray import config, storage
from bsq_ray.data.data_source import DataSource, SampleBlock
from bsq_ray.data.file_ranges import read_tail
from bsq_ray.runtime.wrong_files import describe_wrong_file

TABLE_FILE, TOKENIZER_FOLDER = "tokens.json", "tokenizer"
_VERSION = 1
# Rows read together. A row with 256 tokens of 18 bits has 576 bytes.
_ROW_GROUP_SIZE = 1024
_ROW_GROUP_CACHE_SIZE = 64
# Bytes at the end of a part that contain its footer, unless it has very many row groups.
_FOOTER_BYTES = 2**16
_MAX_FOOTER_THREADS = 32


@dataclass(frozen=True)
class TokenTableInfo:
    """Metadata shared by all parts of a table.

    Attributes:
        tokenizer_id: identifier of the tokenizer's model folder.
        bits: number of bits per token (L).
        grid: frames, rows and columns of tokens.
        classes: names of the labels.
        views: number of rows per image or clip: the center crop, then random crops.
        dataset: hash of the data set and of the options that select crops and clips.
        tokens_id: id that all decoders of these tokens share; None in tables of earlier versions.
    """

    tokenizer_id: str
    bits: int
    grid: tuple[int, int, int]
    classes: tuple[str, ...]
    views: int
    dataset: str
    tokens_id: str | None = None

    @property
    def num_tokens(self) -> int:
        """Number of tokens per row (N)."""
        return int(np.prod(self.grid))

    @property
    def row_bytes(self) -> int:
        """Number of bytes of the packed bits of a row."""
        return -(-self.num_tokens * self.bits // 8)


@dataclass(frozen=True)
class TokenTable:
    """A complete table; each part is (name, number of rows, SHA-256 of the rows)."""

    url: str
    info: TokenTableInfo
    parts: tuple[tuple[str, int, str], ...]

    @property
    def num_rows(self) -> int:
        """Number of rows over all parts."""
        return sum(rows for _, rows, _ in self.parts)

    @property
    def hash(self) -> str:
        """SHA-256 of tokenizer and parts, stored in runs to identify their data set."""
        text = json.dumps([self.info.tokenizer_id, [[name, digest] for name, _, digest in self.parts]])
        return hashlib.sha256(text.encode()).hexdigest()


def write_part(
    url: str, info: TokenTableInfo, keys: list[str], labels_P: np.ndarray, views_P: np.ndarray, packed_PB: np.ndarray
) -> str:
    """Write one part atomically; return the SHA-256 of its rows.

    Args:
        url: file of the part.
        info: metadata of the table.
        keys: sample keys of the rows.
        labels_P, views_P: class and view index of each row.
        packed_PB: packed bits, uint8.
    """
    shape = pa.array([list(info.grid)] * len(keys), pa.list_(pa.int32(), 3))
    columns = {
        "key": pa.array(keys, pa.string()),
        "label": pa.array(labels_P, pa.int64()),
        "view": pa.array(views_P, pa.int16()),
        "shape": shape,
        "bits": pa.array([row.tobytes() for row in packed_PB], pa.binary(info.row_bytes)),
    }
    digest = _rows_digest(keys, labels_P, views_P, packed_PB)
    metadata = {"bsq_ray": _to_json(info), "tokenizer_id": info.tokenizer_id, "rows_sha256": digest}
    buffer = io.BytesIO()
    table = pa.table(columns).replace_schema_metadata(metadata)
    pq.write_table(table, buffer, row_group_size=_ROW_GROUP_SIZE, compression="zstd")
    storage.write_bytes(url, buffer.getvalue())
    return digest


def _rows_digest(keys: list[str], labels_P: np.ndarray, views_P: np.ndarray, packed_PB: np.ndarray) -> str:
    digest = hashlib.sha256("\n".join(keys).encode())
    for column in (labels_P.astype("<i8"), views_P.astype("<i2"), packed_PB):
        digest.update(column.tobytes())
    return digest.hexdigest()


def completed_parts(url: str, names: list[str], info: TokenTableInfo) -> dict[str, tuple[int, str]]:
    """Return the number of rows and SHA-256 of the parts that exist with the same metadata, by name.

    Only the footers of the files are read, with one request each to an object store.
    """
    existing = set(storage.list_folder(url))
    candidates = [name for name in names if name in existing]
    with ThreadPoolExecutor(_MAX_FOOTER_THREADS, thread_name_prefix="read-footers") as pool:
        parts = pool.map(lambda name: completed_part(storage.join(url, name), info), candidates)
        return {name: part for name, part in zip(candidates, parts, strict=True) if part is not None}


def completed_part(url: str, info: TokenTableInfo) -> tuple[int, str] | None:
    """Return the number of rows and SHA-256 of a complete part, from its footer; None if its metadata differ."""
    try:
        footer = pq.read_metadata(io.BytesIO(_read_footer(url)))
    except (pa.ArrowException, OSError):
        return None
    metadata = footer.metadata or {}
    if b"bsq_ray" not in metadata or b"rows_sha256" not in metadata:
        return None
    stored, expected = json.loads(metadata[b"bsq_ray"]), json.loads(_to_json(info))
    if "tokens_id" not in stored:
        # The part of an earlier version.
        expected.pop("tokens_id", None)
    if stored != expected:
        return None
    return footer.num_rows, metadata[b"rows_sha256"].decode()


def _read_footer(url: str) -> bytes:
    """Return the end of a Parquet file: the footer, its length in four bytes, and the magic number."""
    tail = read_tail(url, _FOOTER_BYTES)
    footer_bytes = int.from_bytes(tail[-8:-4], "little") + 8
    return tail if footer_bytes <= len(tail) else read_tail(url, footer_bytes)


def write_table(table: TokenTable) -> None:
    """Write `tokens.json`; call it after all parts are written."""
    record = {"version": _VERSION, **json.loads(_to_json(table.info)), "parts": table.parts}
    storage.write_text(storage.join(table.url, TABLE_FILE), json.dumps(record, indent=1))


def read_table(url: str) -> TokenTable:
    """Read the metadata of a table.

    Raises:
        ValueError: the table is missing, incomplete, damaged, or was written by a newer version.
    """
    path = storage.join(url, TABLE_FILE)
    if not storage.exists(path):
        raise ValueError(
            f"{url} is not a complete token table: it has no {TABLE_FILE}. Write it with `bsq-ray tokenize "
            f"--model TOKENIZER --data SHARDS --out {url}`, which resumes a partial table"
        )
    content, is_newer = storage.read_bytes(path), False
    try:
        record = json.loads(content)
        is_newer = record.pop("version") > _VERSION
        parts = tuple((str(name), int(rows), str(digest)) for name, rows, digest in record.pop("parts"))
        info = TokenTableInfo(**{**record, "grid": tuple(record["grid"]), "classes": tuple(record["classes"])})
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        # A newer version may use another format, so a parse error is not damage.
        if not is_newer:
            raise ValueError(f"{path} {describe_wrong_file(content) or f'is damaged: {error}'}") from error
    if is_newer:
        raise ValueError(f"{path} was written by a newer version of bsq_ray; update it to read this table")
    return TokenTable(url, info, parts)


class TokenSource(DataSource):
    """Data source of the rows of a token table; `values_P` contains packed bits (P, bytes)."""

    def __init__(self, table: TokenTable, model: config.TokenModelConfig, timeout_s: float = 0.0) -> None:
        """Open a table for a model.

        Args:
            table: the table, from `read_table`.
            model: configuration of the model that reads the tokens.
            timeout_s: seconds to retry unavailable storage.

        Raises:
            ValueError: tokenizer, bits, grid or classes do not match the model; the message contains the overrides
                that match.
        """
        info = table.info
        if not model.accepts_tokens(info.tokenizer_id, info.tokens_id):
            raise ValueError(
                f"the tokens in {table.url} were written by tokenizer {info.tokenizer_id[:12]}, "
                f"but the model requires tokenizer {str(model.tokenizer)[:12]}; use a table of that tokenizer"
            )
        mismatches = [
            f"model.{name}={json.dumps(table_value)}"
            for name, table_value, model_value in (
                ("bits", info.bits, model.bits),
                ("grid", list(info.grid), list(model.grid)),
                ("num_classes", len(info.classes), getattr(model, "num_classes", None)),
            )
            if model_value is not None and table_value != model_value
        ]
        if mismatches:
            raise ValueError(f"the tokens in {table.url} do not match the model; set {' '.join(mismatches)}")
        self.table, self.timeout_s = table, timeout_s
        self.url, self.hash = table.url, table.hash
        self.sample_bytes = info.row_bytes
        self.part_starts = np.cumsum([0, *(rows for _, rows, _ in table.parts)])

    @property
    def shard_sizes(self) -> np.ndarray:
        """Rows of each part."""
        return np.diff(self.part_starts)

    @property
    def tokenizer_url(self) -> str:
        """Model folder of the tokenizer, which decodes the tokens."""
        return storage.join(self.url, TOKENIZER_FOLDER)

    def read(self, samples_P: np.ndarray, epochs_P: np.ndarray, seed: int) -> SampleBlock:
        """Read rows; epochs and seed are ignored, because tables contain fixed crops."""
        values_P = np.empty((len(samples_P), self.sample_bytes), np.uint8)
        labels_P = np.empty(len(samples_P), np.int64)
        keys, retries = [""] * len(samples_P), list[str]()
        part_P = np.searchsorted(self.part_starts, samples_P, side="right") - 1
        row_P = samples_P - self.part_starts[part_P]
        for part, group in np.unique(np.stack([part_P, row_P // _ROW_GROUP_SIZE], 1), axis=0):
            url = storage.join(self.url, self.table.parts[part][0])
            read = partial(_read_row_group, url, int(group), self.table.parts[part][2])
            group_keys, group_labels, group_values = storage.retry_while_unavailable(
                read, self.timeout_s, retries.append
            )
            for p in np.flatnonzero((part_P == part) & (row_P // _ROW_GROUP_SIZE == group)):
                row = int(row_P[p]) % _ROW_GROUP_SIZE
                keys[p], labels_P[p], values_P[p] = group_keys[row], group_labels[row], group_values[row]
        return SampleBlock(values_P, labels_P, keys, retries=retries)

    def read_eval(self, samples: range) -> SampleBlock:
        """Read the same rows as `read`."""
        return self.read(np.asarray(samples), np.zeros(len(samples), np.int64), 0)

    def iter_blocks(self) -> Iterator[SampleBlock]:
        """Yield all rows in order, one row group at a time."""
        for start, end in pairwise(self.part_starts.tolist()):
            for first in range(start, end, _ROW_GROUP_SIZE):
                yield self.read_eval(range(first, min(first + _ROW_GROUP_SIZE, end)))


@lru_cache(_ROW_GROUP_CACHE_SIZE)
def _read_row_group(url: str, group: int, digest: str) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Return keys, labels and packed bits of a row group; `digest` is only a cache key, it detects rewritten parts."""
    # pyarrow raises OSError for damaged content too. On local disks it counts as damage, elsewhere as a storage error.
    error_context = nullcontext() if storage.is_local(url) else storage.translate_errors(url, "read")
    try:
        with storage.open_url(url) as file, error_context:
            columns = ["key", "label", "bits"]
            table = pq.ParquetFile(file).read_row_group(group, columns, use_threads=False)
    except storage.StorageUnavailableError:
        raise
    except (OSError, ValueError, pa.ArrowException) as error:
        reason = " ".join(str(error).split()).removeprefix(f"cannot read {url}: ")
        raise RuntimeError(f"{url} cannot be read: {reason}") from error
    bits = table["bits"].combine_chunks()
    values = np.frombuffer(b"".join(bits.to_pylist()), np.uint8).reshape(len(table), -1)
    return table["key"].to_pylist(), table["label"].to_numpy(), values


def _to_json(info: TokenTableInfo) -> str:
    return json.dumps({key: value for key, value in info.__dict__.items() if value is not None}, sort_keys=True)
