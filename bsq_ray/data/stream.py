"""Shards to batches, in the order of `order.py`, executed by Ray Data or by threads of this process.

    position ─order─▶ samples of this worker ─cut─▶ chunks ─read by the source─▶ blocks of samples ─▶ batches

What is read when is decided by pure functions; an executor only carries out the chunks it is given, in their order. No
JPEG bytes travel: a chunk of photographs is fetched, decoded and cropped in one place.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import count, islice
from typing import Any, Literal

import numpy as np
import torch

from bsq_ray import config
from bsq_ray.data.data_source import Batch, DataSource, SampleBlock
from bsq_ray.data.order import Order, worker_positions

Executor = Literal["ray", "local"]

# Samples and bytes of crops read by one task: enough to hide a task's cost, few enough to begin soon and fit memory.
_CHUNK_SAMPLES, _CHUNK_BYTES = 256, 12 * 2**20
# Chunks of one Ray Data execution, and executions ahead of the one being consumed.
_CHUNKS_PER_EXECUTION, _EXECUTIONS_AHEAD = 4, 3


@dataclass
class SkippedSamples:
    """Samples that could not be read, each named once however often it is met, and how many are tolerated.

    Attributes:
        delays: what storage failed with before other samples could be read.
    """

    limit: int
    samples: list[str] = field(default_factory=list)
    retries: list[str] = field(default_factory=list)

    def add(self, reports: list[str]) -> None:
        """Counts damaged samples.

        Raises:
            RuntimeError: there are more than the limit; the message names the newest.
        """
        self.samples.extend(report for report in dict.fromkeys(reports) if report not in self.samples)
        if len(self.samples) > self.limit:
            raise RuntimeError(
                f"{len(self.samples)} damaged samples are more than data.max_skipped_samples = {self.limit}; "
                f"the last one: {self.samples[-1]}"
            )


def training_batches(
    source: DataSource,
    data_config: config.DataOrderConfig,
    batch_size: int,
    rank: int,
    world_size: int,
    seed: int,
    position: int = 0,
    executor: Executor = "local",
    skipped: SkippedSamples | None = None,
) -> Generator[Batch, None, None]:
    """This worker's share of each global batch, endlessly, from a position on; reading begins at once.

    Args:
        source: the data set.
        section: the data section of the configuration.
        batch_size: samples of a global batch.
        rank, world: this worker and how many there are.
        seed: seed of order and crops.
        position: samples that all workers together have consumed so far.
        executor: who reads: Ray Data's tasks, or threads of this process. The batches are the same.
        damage: collects damaged samples; by default a new one with the configured limit.

    Raises:
        ValueError: the batch cannot be shared evenly.
        RuntimeError: more samples are damaged than allowed.
    """
    skipped = skipped or SkippedSamples(data_config.max_skipped_samples)
    local_batch_size = batch_size // world_size
    chunk_size = local_batch_size * max(1, min(_CHUNK_SAMPLES, _CHUNK_BYTES // source.sample_bytes) // local_batch_size)
    order = Order(source.shard_sizes, seed, data_config.interleave, data_config.shuffle_block_size)
    worker_positions(position, position, batch_size, rank, world_size)  # refuses an uneven share before anything starts
    read = partial(_read_chunk, source, order, (position, chunk_size, batch_size, rank, world_size))
    num_ahead = max(1, -(-data_config.prefetch_batches * local_batch_size // chunk_size))
    if executor == "ray":
        blocks = _ray_blocks(read, _num_read_tasks(world_size))
    else:
        blocks = _local_blocks(read, num_ahead)
    return _to_batches(_prefetch_first(blocks), local_batch_size, skipped)


def _prefetch_first(blocks: Iterator[SampleBlock]) -> Iterator[SampleBlock]:
    """The same blocks; the first one is being read already."""
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
    """Blocks to batches of `share` samples."""
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
    """Every sample once, in the order of the shards.

    Args:
        limit: only the first so many samples of the data set.
        damage: collects samples that cannot be read; they are left out. By default none is tolerated.
    """
    skipped = skipped or SkippedSamples(0)
    for block in evaluation_blocks(source, batch_size, limit):
        skipped.retries.extend(block.retries)
        skipped.add(block.skipped)
        if block.keys:
            yield Batch(torch.from_numpy(block.values_P), torch.from_numpy(block.labels_P), block.keys)


def evaluation_blocks(source: DataSource, batch_size: int, limit: int | None = None) -> Iterator[SampleBlock]:
    """The same, read by threads of this process and with the damaged samples of each batch beside it."""
    chunks = _evaluation_chunks(source.num_samples, batch_size, limit)
    return _local_blocks(lambda chunk: source.read_eval(chunks[chunk]), 2, len(chunks))


def evaluation_dataset(source: DataSource, batch_size: int, limit: int | None = None) -> Any:
    """The same as a Ray Data set with one row for each batch: {"block": Samples}, in the same order."""
    import ray

    def read(rows: dict[str, np.ndarray]) -> dict[str, Any]:
        block = np.empty(1, object)
        block[0] = ray.get(source_ref).read_eval(range(int(rows["first"][0]), int(rows["last"][0])))
        return {"block": block}

    source_ref = ray.put(source)
    _configure_ray_data()
    chunks = [{"first": c.start, "last": c.stop} for c in _evaluation_chunks(source.num_samples, batch_size, limit)]
    return ray.data.from_items(chunks, override_num_blocks=len(chunks)).map_batches(read, batch_size=1)


def _evaluation_chunks(num_samples: int, batch_size: int, limit: int | None) -> list[range]:
    total = num_samples if limit is None else min(num_samples, limit)
    return [range(first, min(first + batch_size, total)) for first in range(0, total, batch_size)]


def _read_chunk(source: DataSource, order: Order, layout: tuple[int, int, int, int, int], chunk: int) -> SampleBlock:
    """The `chunk`-th run of this worker's samples after the start position."""
    position, chunk_size, batch_size, rank, world_size = layout
    first = position + chunk * chunk_size * world_size
    epochs_P, samples_P = order.at(
        worker_positions(first, first + chunk_size * world_size, batch_size, rank, world_size)
    )
    return source.read(samples_P, epochs_P, order.seed)


def _local_blocks(
    read: Callable[[int], SampleBlock], num_ahead: int, num_chunks: int | None = None
) -> Iterator[SampleBlock]:
    """Chunks read by threads, `ahead` of the consumer; without `chunks`, endlessly."""
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


def _ray_blocks(read: Callable[[int], SampleBlock], num_tasks: int) -> Iterator[SampleBlock]:
    """Chunks read by Ray Data's tasks, in order, endlessly.

    Ray Data is given a few chunks at a time and runs them to their end ahead of the consumer: while it waits for a slow
    consumer its scheduling loop would spin, on a core that trains. One execution begins before the other ends, so that
    the cluster does not idle between them; only the first has a single chunk, and the cluster to itself, so that
    training begins soon.
    """
    import ray
    from ray.data.block import BlockAccessor

    read_ref = ray.put(read)
    with ThreadPoolExecutor(_EXECUTIONS_AHEAD, thread_name_prefix="read-ahead") as pool:
        blocks = _execute(read_ref, range(1), num_tasks)
        starts = count(1, _CHUNKS_PER_EXECUTION)
        executions = (pool.submit(_execute, read_ref, range(n, n + _CHUNKS_PER_EXECUTION), num_tasks) for n in starts)
        pending = deque(islice(executions, _EXECUTIONS_AHEAD))
        while True:
            for block in blocks:
                row = BlockAccessor.for_block(ray.get(block)).to_numpy()
                skipped, retries = (
                    [line for line in str(row[name][0]).split("\n") if line] for name in ("damaged", "delays")
                )
                yield SampleBlock(row["values"][0], row["labels"][0], str(row["keys"][0]).split("\n"), skipped, retries)
            blocks = pending.popleft().result()
            pending.extend(islice(executions, 1))


def _execute(read_ref: Any, chunks: range, num_tasks: int) -> list[Any]:
    """Runs one execution of Ray Data to its end; references to its blocks, one per chunk, in order."""
    import ray
    from ray.data import TaskPoolStrategy

    def run(rows: dict[str, np.ndarray]) -> dict[str, Any]:
        block = ray.get(read_ref)(int(rows["id"][0]))
        # One row per chunk: a block is handed over whole, without per-sample bookkeeping.
        return {
            "values": block.values_P[None],
            "labels": block.labels_P[None],
            "keys": ["\n".join(block.keys)],
            "damaged": ["\n".join(block.damaged)],
            "delays": ["\n".join(block.delays)],
        }

    _configure_ray_data()
    ids = ray.data.from_items([{"id": chunk} for chunk in chunks], override_num_blocks=len(chunks))
    return list(
        ids.map_batches(run, batch_size=1, compute=TaskPoolStrategy(size=num_tasks)).materialize().to_arrow_refs()
    )


def _configure_ray_data() -> None:
    from ray.data import DataContext

    context = DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False


def _num_read_tasks(world_size: int) -> int:
    """Tasks that read for one worker: its share of the cluster's CPUs, less the one that computes."""
    import ray

    return max(1, min(8, int(ray.cluster_resources()["CPU"]) // world_size - 1))
