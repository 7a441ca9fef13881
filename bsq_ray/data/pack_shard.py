"""Pack one shard: read its files ahead with threads, decode and check them, write the tar and its index.

    files ─read ahead, encode─▶ shard-000000.tar ─▶ shard-000000.arrow: index, and the record of a complete shard

The index is written last. It contains a hash of the files and options, so an interrupted run never packs a finished
shard again, and never keeps one of other files.
"""

from __future__ import annotations

import hashlib
import io
import json
import posixpath
import tarfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import TypeVar

from bsq_ray import storage
from bsq_ray.data.pack_source import FileSource, read_source
from bsq_ray.data.sample_index import SampleEntry, Shard, ShardRow, index_rows, read_index, shard_row, write_index
from bsq_ray.data.transcode import StoredFile, TooShortError
from bsq_ray.media.video_reader import VideoInfo

_TAR_BLOCK_BYTES = 512
# Files that one task reads at a time. Each waits for the storage.
_NUM_READ_THREADS = 16
# Bytes that are read ahead, beyond the first file.
_READ_AHEAD_BYTES = 64 * 2**20
Value = TypeVar("Value")
# Maps the content of a file and its suffix to the stored file; raises ValueError if it cannot be decoded.
EncodeFn = Callable[[bytes, str], StoredFile]


@dataclass
class ShardResult:
    """Result of packing one shard.

    Attributes:
        num_files: number of files of the plan.
        row: row of the manifest; None if no file was usable.
        damaged_files, too_short_files, changed_files: as in `PackReport`.
        retries: messages of storage errors before a retry succeeded.
        is_reused: True if an earlier run had packed the shard.
    """

    num_files: int
    row: ShardRow | None = None
    damaged_files: list[str] = field(default_factory=list)
    too_short_files: list[str] = field(default_factory=list)
    changed_files: list[str] = field(default_factory=list)
    retries: list[str] = field(default_factory=list)
    is_reused: bool = False


@dataclass(frozen=True)
class ShardPacker:
    """Packs shards of one data set.

    Args:
        destination: folder of the shards.
        encode: see `EncodeFn`.
        options_key: text that identifies the options of `encode`.
        kind: "images" or "videos".
        timeout_s: seconds to retry unavailable storage.
    """

    destination: str
    encode: EncodeFn
    options_key: str
    kind: str
    timeout_s: float

    def __call__(self, name: str, sources: Sequence[FileSource]) -> ShardResult:
        """Return the result of an earlier run with the same files and options, or pack the shard.

        Raises:
            StorageUnavailableError: the storage is still unavailable after the timeout.
        """
        plan_hash = self._plan_hash(sources)
        retries: list[str] = []
        finished = self._retry(lambda: read_index(self.destination, name), retries)
        if finished is not None and finished[1].get("plan") == plan_hash:
            shard, facts, index_bytes = finished
            row = shard_row(shard, index_bytes) if shard.num_samples else None
            return ShardResult(len(sources), row, **facts["reports"], retries=retries, is_reused=True)
        return self._pack(name, sources, plan_hash)

    def _plan_hash(self, sources: Sequence[FileSource]) -> str:
        plan = [self.options_key, self.kind, [list(asdict(source).values()) for source in sources]]
        return hashlib.sha256(json.dumps(plan).encode()).hexdigest()

    def _pack(self, name: str, sources: Sequence[FileSource], plan_hash: str) -> ShardResult:
        result = ShardResult(len(sources))
        archive = io.BytesIO()
        entries: list[SampleEntry] = []
        videos: list[VideoInfo] = []
        with tarfile.open(fileobj=archive, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for source, content in self._read_ahead(sources, result.retries):
                encoded = self._encode(source, content, result)
                if encoded is None:
                    continue
                offset = archive.tell() + _TAR_BLOCK_BYTES
                entries.append(SampleEntry(source.key, source.label, offset, len(encoded.data)))
                videos += [encoded.video] if encoded.video is not None else []
                _add_member(tar, f"{source.key}.{encoded.suffix}", encoded.data)
                _add_member(tar, f"{source.key}.cls", str(source.label).encode())
        content = archive.getvalue()
        rows = index_rows(entries, videos if self.kind == "videos" else None)
        shard = Shard(name, len(content), hashlib.sha256(content).hexdigest(), rows)
        if entries:
            url = storage.join(self.destination, name)
            self._retry(lambda: storage.write_bytes(url, content), result.retries)
        reports = {key: getattr(result, key) for key in ("damaged_files", "too_short_files", "changed_files")}
        facts = {"plan": plan_hash, "reports": reports}
        index_bytes = self._retry(lambda: write_index(self.destination, shard, facts), result.retries)
        result.row = shard_row(shard, index_bytes) if entries else None
        return result

    def _encode(self, source: FileSource, content: bytes | ValueError, result: ShardResult) -> StoredFile | None:
        """Return the file to store; report a damaged or short file and return None."""
        try:
            if isinstance(content, ValueError):
                raise content
            encoded = self.encode(content, posixpath.splitext(source.name)[1][1:].lower())
        except TooShortError as error:
            result.too_short_files.append(f"{source.name}: {error}")
            return None
        except storage.StorageUnavailableError:
            # The file may be intact, so a data set without it would be incomplete.
            raise
        except ValueError as error:
            result.damaged_files.append(f"{source.name}: {error}")
            return None
        if encoded.change:
            result.changed_files.append(f"{source.name}: {encoded.change}")
        return encoded

    def _read_ahead(
        self, sources: Sequence[FileSource], retries: list[str]
    ) -> Iterator[tuple[FileSource, bytes | ValueError]]:
        """Yield each file with its content, or the error of reading it, in their order."""

        def read(source: FileSource) -> bytes | ValueError:
            try:
                return self._retry(lambda: read_source(source), retries)
            except ValueError as error:
                return error

        with ThreadPoolExecutor(_NUM_READ_THREADS, thread_name_prefix="read-files") as pool:
            pending: deque[tuple[FileSource, Future[bytes | ValueError]]] = deque()
            remaining, num_bytes = deque(sources), 0
            while remaining or pending:
                while remaining and (not pending or num_bytes + remaining[0].size <= _READ_AHEAD_BYTES):
                    source = remaining.popleft()
                    num_bytes += source.size
                    pending.append((source, pool.submit(read, source)))
                source, content = pending.popleft()
                num_bytes -= source.size
                yield source, content.result()

    def _retry(self, operation: Callable[[], Value], retries: list[str]) -> Value:
        return storage.retry_while_unavailable(operation, self.timeout_s, retries.append)


def _add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
