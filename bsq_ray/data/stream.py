"""Read batches in the order of `order.py`, with Ray Data tasks or with threads of this process.

    position ─order─▶ samples of this worker ─cut─▶ chunks ─read by the source─▶ blocks of samples ─▶ batches

Pure functions decide the content of each chunk; an executor only reads the chunks, in their order. A chunk is fetched,
decoded and cropped in one task, so encoded images are never sent between processes.

Shape suffixes: B samples of a batch, P samples of a block.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import count, islice
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch

from bsq_ray import config
from bsq_ray.data.data_source import Batch, DataSource, SampleBlock
from bsq_ray.data.order import Order, worker_positions
from bsq_ray.runtime._ray_internals import block_to_numpy

Executor = Literal["ray", "local"]

# Samples and bytes of crops per task: enough to hide the overhead of a task, few enough to start soon and fit memory.
_CHUNK_SAMPLES, _CHUNK_BYTES = 256, 12 * 2**20
# Chunks per Ray Data execution, and executions ahead of the consumed one.
_CHUNKS_PER_EXECUTION, _EXECUTIONS_AHEAD = 4, 3
# More chunks if they have few samples, because batches of several shapes cannot share a chunk.
_MAX_CHUNKS_PER_EXECUTION = 64


@dataclass
class SkippedSamples:
    """Unreadable samples, each listed once, and their limit.

    Attributes:
        limit: number of samples that may be skipped.
        samples: "shard: key: reason" of each.
        retries: messages of storage errors before a retry succeeded.
    """

    limit: int
    samples: list[str] = field(default_factory=list)
    retries: list[str] = field(default_factory=list)
    _known: set[str] = field(default_factory=set, repr=False)

    def add(self, reports: list[str]) -> None:
        """Count skipped samples.

        Args:
            reports: "shard: key: reason" of each.

        Raises:
            RuntimeError: there are more than the limit; the message names the last one.
        """
        new_reports = [report for report in dict.fromkeys(reports) if report not in self._known]
        self.samples.extend(new_reports)
        self._known.update(new_reports)
        if len(self.samples) > self.limit:
            raise RuntimeError(
                f"{len(self.samples)} damaged samples are more than data.max_skipped_samples = {self.limit}; "
                f"the last one: {self.samples[-1]}"
            )


def training_batches(
    source: DataSource,
    data_config: config.DataOrderConfig,
    *,
    batch_size: int,
    rank: int,
    world_size: int,
    seed: int,
    position: int = 0,
    executor: Executor = "local",
    skipped: SkippedSamples | None = None,
) -> Generator[Batch, None, None]:
    """Yield this worker's part of each global batch, endlessly; reading starts at once.

    Args:
        source: the data set.
        data_config: order, prefetching and the limit of skipped samples.
        batch_size: samples of a global batch.
        rank, world_size: this worker, and the number of workers.
        seed: seed of order and crops.
        position: number of samples that all workers together have consumed.
        executor: "ray" reads with Ray Data tasks, "local" with threads of this process; the batches are the same.
        skipped: collects skipped samples; None uses a new one with the configured limit.

    Raises:
        ValueError: the batch cannot be split evenly.
        RuntimeError: more samples are skipped than allowed.
    """
    skipped = skipped or SkippedSamples(data_config.max_skipped_samples)
    local_batch_size = batch_size // world_size
    num_batches = max(1, min(_CHUNK_SAMPLES, _CHUNK_BYTES // source.sample_bytes) // local_batch_size)
    chunk_size = local_batch_size * min(num_batches, source.max_batches_per_read or num_batches)
    worker_positions(position, position, batch_size, rank, world_size)  # raises before anything starts
    read = _ChunkReader(source, data_config, seed, position, chunk_size, batch_size, rank, world_size)
    num_ahead = max(1, -(-data_config.prefetch_batches * local_batch_size // chunk_size))
    if executor == "ray":
        # As many samples in an execution as if each chunk had several batches.
        num_chunks = min(
            _MAX_CHUNKS_PER_EXECUTION, _CHUNKS_PER_EXECUTION * (local_batch_size * num_batches // chunk_size)
        )
        blocks = _ray_blocks(read, _num_read_tasks(world_size), num_chunks)
    else:
        blocks = _local_blocks(read, num_ahead)
    return _to_batches(_prefetch_first(blocks), local_batch_size, skipped)


def _prefetch_first(blocks: Iterator[SampleBlock]) -> Iterator[SampleBlock]:
    """Return the same blocks, and start reading the first one."""
    thread = ThreadPoolExecutor(1, thread_name_prefix="read-first")
    first = thread.submit(next, blocks)
    thread.shutdown(wait=False)

    def all_blocks() -> Iterator[SampleBlock]:
        yield first.result()
        yield from blocks

    return all_blocks()


def _to_batches(
    blocks: Iterator[SampleBlock], local_batch_size: int, skipped: SkippedSamples
) -> Generator[Batch, None, None]:
    """Split blocks into batches of `local_batch_size` samples."""
    for block in blocks:
        skipped.retries.extend(block.retries)
        skipped.add(block.skipped)
        for first in range(0, len(block.keys), local_batch_size):
            rows = slice(first, first + local_batch_size)
            values_B = torch.from_numpy(np.array(block.values_P[rows]))
            yield Batch(values_B, torch.from_numpy(np.array(block.labels_P[rows])), block.keys[rows])


def evaluation_batches(
    source: DataSource, batch_size: int, limit: int | None = None, skipped: SkippedSamples | None = None
) -> Iterator[Batch]:
    """Yield every sample once, in the order of the shards.

    Args:
        source: the data set.
        batch_size: samples of a batch.
        limit: number of leading samples to read; None reads all.
        skipped: collects unreadable samples, which are left out; None allows none.

    Raises:
        RuntimeError: more samples are skipped than allowed.
    """
    skipped = skipped or SkippedSamples(0)
    for block in evaluation_blocks(source, batch_size, limit):
        skipped.retries.extend(block.retries)
        skipped.add(block.skipped)
        if block.keys:
            yield Batch(torch.from_numpy(block.values_P), torch.from_numpy(block.labels_P), block.keys)


def evaluation_blocks(source: DataSource, batch_size: int, limit: int | None = None) -> Iterator[SampleBlock]:
    """Yield the blocks of `evaluation_batches`, with the skipped samples of each, read by threads of this process."""
    chunks = _EvaluationChunks(_num_evaluated(source, limit), batch_size)
    return _local_blocks(lambda number: source.read_eval(chunks[number]), 2, len(chunks))


def evaluation_share(
    source: DataSource, batch_size: int, limit: int, rank: int, world_size: int
) -> Iterator[SampleBlock]:
    """Yield this worker's part of `limit` evenly spaced samples: every `world_size`-th, in blocks of `batch_size`.

    All workers get the same number of blocks. A block without samples has no keys, and values of any one sample or of
    none.
    """
    total = min(source.num_samples, limit)
    spacing = source.num_samples // total if total else 1
    num_blocks = -(-total // (batch_size * world_size))

    def read(number: int) -> SampleBlock:
        first = rank + number * batch_size * world_size
        last = min(total, first + batch_size * world_size)
        if first < last:
            return source.read_eval(range(first * spacing, last * spacing, world_size * spacing))
        placeholder = source.read_eval(range(1))
        return SampleBlock(placeholder.values_P, placeholder.labels_P, [])

    return _local_blocks(read, 2, num_blocks)


def evaluation_dataset(source: DataSource, batch_size: int, limit: int | None = None) -> Any:
    """Return the blocks of `evaluation_blocks` as a Ray dataset, one row per batch: {"block": SampleBlock}."""
    import ray

    def read(rows: dict[str, np.ndarray]) -> dict[str, Any]:
        block = np.empty(1, object)
        block[0] = _get_once(source_ref).read_eval(chunks[int(rows["id"][0])])
        return {"block": block}

    source_ref = ray.put(source)
    _configure_ray_data()
    chunks = _EvaluationChunks(_num_evaluated(source, limit), batch_size)
    return ray.data.range(len(chunks), override_num_blocks=len(chunks)).map_batches(read, batch_size=1)


@dataclass(frozen=True)
class _EvaluationChunks:
    """Ranges of `batch_size` samples, computed on access because a data set can have millions of them."""

    num_samples: int
    batch_size: int

    def __len__(self) -> int:
        return -(-self.num_samples // self.batch_size)

    def __getitem__(self, number: int) -> range:
        first = number * self.batch_size
        return range(first, min(first + self.batch_size, self.num_samples))


def _num_evaluated(source: DataSource, limit: int | None) -> int:
    return source.num_samples if limit is None else min(source.num_samples, limit)


@dataclass(frozen=True)
class _ChunkReader:
    """Reads the `chunk`-th range of a worker's samples after the start position."""

    source: DataSource
    data_config: config.DataOrderConfig
    seed: int
    start: int
    chunk_size: int
    batch_size: int
    rank: int
    world_size: int

    def __call__(self, chunk: int) -> SampleBlock:
        # A chunk of every worker together.
        global_size = self.chunk_size * self.world_size
        first = self.start + chunk * global_size
        positions_P = worker_positions(first, first + global_size, self.batch_size, self.rank, self.world_size)
        epochs_P, samples_P = self._order.at(positions_P)
        return self.source.read(samples_P, epochs_P, self.seed)

    @cached_property
    def _order(self) -> Order:
        # Computed in the process that reads: the sizes of all shards are not sent to it.
        return self.source.order(self.seed, self.data_config)


def _local_blocks(
    read: Callable[[int], SampleBlock], num_ahead: int, num_chunks: int | None = None
) -> Iterator[SampleBlock]:
    """Yield chunks read by threads, `num_ahead` before the consumer; endless if `num_chunks` is None."""
    num_threads = min(4, os.cpu_count() or 1)
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="read")
    remaining = iter(range(num_chunks)) if num_chunks is not None else count()
    pending: deque[Future[SampleBlock]] = deque(
        pool.submit(read, chunk) for chunk in islice(remaining, num_ahead + num_threads - 1)
    )
    try:
        while pending:
            block = pending.popleft().result()
            pending.extend(pool.submit(read, chunk) for chunk in islice(remaining, 1))
            yield block
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _ray_blocks(read: Callable[[int], SampleBlock], num_tasks: int, num_chunks: int) -> Iterator[SampleBlock]:
    """Yield chunks read by Ray Data tasks, in order, endlessly.

    Ray Data executes `num_chunks` chunks at a time, ahead of the consumer. A streaming execution that waits for a slow
    consumer would keep its scheduling loop busy, on a core that trains. Executions overlap, so the cluster does not
    idle between them. The first has a single chunk and the cluster to itself, so training starts soon.
    """
    import ray

    read_ref = ray.put(read)
    with ThreadPoolExecutor(_EXECUTIONS_AHEAD, thread_name_prefix="read-ahead") as pool:
        blocks = _execute(read_ref, range(1), num_tasks)
        starts = count(1, num_chunks)
        executions = (pool.submit(_execute, read_ref, range(n, n + num_chunks), num_tasks) for n in starts)
        pending = deque(islice(executions, _EXECUTIONS_AHEAD))
        while True:
            for block in blocks:
                row = block_to_numpy(ray.get(block))
                keys, skipped, retries = (list(map(str, row[name][0])) for name in ("keys", "skipped", "retries"))
                yield SampleBlock(row["values"][0], row["labels"][0], keys, skipped, retries)
            blocks = pending.popleft().result()
            pending.extend(islice(executions, 1))


@lru_cache(4)
def _get_once(ref: Any) -> Any:
    """Return an object of Ray's object store; a process receives it once and keeps what it has opened."""
    import ray

    return ray.get(ref)


def _execute(read_ref: Any, chunks: range, num_tasks: int) -> list[Any]:
    """Run one Ray Data execution to its end; return references to its blocks, one per chunk, in order."""
    import ray
    from ray.data import TaskPoolStrategy

    def run(rows: dict[str, np.ndarray]) -> dict[str, Any]:
        block = _get_once(read_ref)(int(rows["id"][0]))
        # One row per chunk avoids per-sample overhead.
        return {
            "values": block.values_P[None],
            "labels": block.labels_P[None],
            "keys": _list_column(block.keys),
            "skipped": _list_column(block.skipped),
            "retries": _list_column(block.retries),
        }

    _configure_ray_data()
    ids = ray.data.from_items([{"id": chunk} for chunk in chunks], override_num_blocks=len(chunks))
    return list(
        ids.map_batches(run, batch_size=1, compute=TaskPoolStrategy(size=num_tasks)).materialize().to_arrow_refs()
    )


def _list_column(texts: list[str]) -> pa.Array:
    return pa.array([texts], pa.list_(pa.string()))


def _configure_ray_data() -> None:
    from ray.data import DataContext

    context = DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False


def _num_read_tasks(world_size: int) -> int:
    """Return the number of reading tasks per worker: its fraction of the cluster's CPUs, less the one that trains."""
    import ray

    return max(1, min(8, int(ray.cluster_resources()["CPU"]) // world_size - 1))
