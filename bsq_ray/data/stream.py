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
from bsq_ray.data.data_source import Batch, Samples, Source
from bsq_ray.data.order import Order, worker_positions

Executor = Literal["ray", "local"]

# Samples and bytes of crops read by one task: enough to hide a task's cost, few enough to begin soon and fit memory.
_CHUNK, _CHUNK_BYTES = 256, 12 * 2**20
# Chunks of one Ray Data execution, and executions ahead of the one being consumed.
_CHUNKS_PER_EXECUTION, _EXECUTIONS_AHEAD = 4, 3


@dataclass
class Damage:
    """Samples that could not be read, each named once however often it is met, and how many are tolerated.

    Attributes:
        delays: what storage failed with before other samples could be read.
    """

    limit: int
    found: list[str] = field(default_factory=list)
    delays: list[str] = field(default_factory=list)

    def add(self, reports: list[str]) -> None:
        """Counts damaged samples.

        Raises:
            RuntimeError: there are more than the limit; the message names the newest.
        """
        self.found.extend(report for report in dict.fromkeys(reports) if report not in self.found)
        if len(self.found) > self.limit:
            raise RuntimeError(
                f"{len(self.found)} damaged samples are more than data.max_damaged = {self.limit}; "
                f"the last one: {self.found[-1]}"
            )


def training_batches(
    source: Source,
    section: config.Reading,
    batch_size: int,
    rank: int,
    world: int,
    seed: int,
    position: int = 0,
    executor: Executor = "local",
    damage: Damage | None = None,
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
    damage = damage or Damage(section.max_damaged)
    share = batch_size // world
    chunk = share * max(1, min(_CHUNK, _CHUNK_BYTES // source.sample_bytes) // share)
    order = Order(source.shard_sizes, seed, section.lanes, section.shuffle_window)
    worker_positions(position, position, batch_size, rank, world)  # refuses an uneven share before anything starts
    read = partial(_read_chunk, source, order, (position, chunk, batch_size, rank, world))
    ahead = max(1, -(-section.prefetch_batches * share // chunk))
    if executor == "ray":
        blocks = _ray_blocks(read, _reading_tasks(world))
    else:
        blocks = _local_blocks(read, ahead)
    return _cut(_begun(blocks), share, damage)


def _begun(blocks: Iterator[Samples]) -> Iterator[Samples]:
    """The same blocks; the first one is being read already."""
    thread = ThreadPoolExecutor(1, thread_name_prefix="read-first")
    first = thread.submit(next, blocks)
    thread.shutdown(wait=False)

    def all_blocks() -> Iterator[Samples]:
        yield first.result()
        yield from blocks

    return all_blocks()


def _cut(blocks: Iterator[Samples], share: int, damage: Damage) -> Generator[Batch, None, None]:
    """Blocks to batches of `share` samples."""
    for block in blocks:
        damage.delays.extend(block.delays)
        damage.add(block.damaged)
        for first in range(0, len(block.keys), share):
            part = slice(first, first + share)
            values_B = torch.from_numpy(np.array(block.values_P[part]))
            yield Batch(values_B, torch.from_numpy(np.array(block.labels_P[part])), block.keys[part])


def evaluation_batches(
    source: Source, batch_size: int, limit: int | None = None, damage: Damage | None = None
) -> Iterator[Batch]:
    """Every sample once, in the order of the shards.

    Args:
        limit: only the first so many samples of the data set.
        damage: collects samples that cannot be read; they are left out. By default none is tolerated.
    """
    damage = damage or Damage(0)
    for block in evaluation_blocks(source, batch_size, limit):
        damage.delays.extend(block.delays)
        damage.add(block.damaged)
        if block.keys:
            yield Batch(torch.from_numpy(block.values_P), torch.from_numpy(block.labels_P), block.keys)


def evaluation_blocks(source: Source, batch_size: int, limit: int | None = None) -> Iterator[Samples]:
    """The same, read by threads of this process and with the damaged samples of each batch beside it."""
    chunks = _evaluation_chunks(source.samples, batch_size, limit)
    return _local_blocks(lambda chunk: source.read_held_out(chunks[chunk]), 2, len(chunks))


def evaluation_dataset(source: Source, batch_size: int, limit: int | None = None) -> Any:
    """The same as a Ray Data set with one row for each batch: {"block": Samples}, in the same order."""
    import ray

    def read(rows: dict[str, np.ndarray]) -> dict[str, Any]:
        block = np.empty(1, object)
        block[0] = ray.get(shared).read_held_out(range(int(rows["first"][0]), int(rows["last"][0])))
        return {"block": block}

    shared = ray.put(source)
    _quiet_and_ordered()
    chunks = [{"first": c.start, "last": c.stop} for c in _evaluation_chunks(source.samples, batch_size, limit)]
    return ray.data.from_items(chunks, override_num_blocks=len(chunks)).map_batches(read, batch_size=1)


def _evaluation_chunks(samples: int, batch_size: int, limit: int | None) -> list[range]:
    total = samples if limit is None else min(samples, limit)
    return [range(first, min(first + batch_size, total)) for first in range(0, total, batch_size)]


def _read_chunk(source: Source, order: Order, place: tuple[int, int, int, int, int], chunk: int) -> Samples:
    """The `chunk`-th run of this worker's samples after the start position."""
    position, length, batch_size, rank, world = place
    first = position + chunk * length * world
    epochs_P, samples_P = order.at(worker_positions(first, first + length * world, batch_size, rank, world))
    return source.read(samples_P, epochs_P, order.seed)


def _local_blocks(read: Callable[[int], Samples], ahead: int, chunks: int | None = None) -> Iterator[Samples]:
    """Chunks read by threads, `ahead` of the consumer; without `chunks`, endlessly."""
    threads = min(4, os.cpu_count() or 1)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="read")
    todo = iter(range(chunks)) if chunks is not None else count()
    pending: deque[Future[Samples]] = deque(pool.submit(read, chunk) for chunk in islice(todo, ahead + threads - 1))
    try:
        while pending:
            block = pending.popleft().result()
            pending.extend(pool.submit(read, chunk) for chunk in islice(todo, 1))
            yield block
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _ray_blocks(read: Callable[[int], Samples], tasks: int) -> Iterator[Samples]:
    """Chunks read by Ray Data's tasks, in order, endlessly.

    Ray Data is given a few chunks at a time and runs them to their end ahead of the consumer: while it waits for a slow
    consumer its scheduling loop would spin, on a core that trains. One execution begins before the other ends, so that
    the cluster does not idle between them; only the first has a single chunk, and the cluster to itself, so that
    training begins soon.
    """
    import ray
    from ray.data.block import BlockAccessor

    reader = ray.put(read)
    with ThreadPoolExecutor(_EXECUTIONS_AHEAD, thread_name_prefix="read-ahead") as pool:
        blocks = _execute(reader, range(1), tasks)
        starts = count(1, _CHUNKS_PER_EXECUTION)
        later = (pool.submit(_execute, reader, range(n, n + _CHUNKS_PER_EXECUTION), tasks) for n in starts)
        ahead = deque(islice(later, _EXECUTIONS_AHEAD))
        while True:
            for block in blocks:
                row = BlockAccessor.for_block(ray.get(block)).to_numpy()
                damaged, delays = (
                    [line for line in str(row[name][0]).split("\n") if line] for name in ("damaged", "delays")
                )
                yield Samples(row["values"][0], row["labels"][0], str(row["keys"][0]).split("\n"), damaged, delays)
            blocks = ahead.popleft().result()
            ahead.extend(islice(later, 1))


def _execute(reader: Any, chunks: range, tasks: int) -> list[Any]:
    """Runs one execution of Ray Data to its end; references to its blocks, one per chunk, in order."""
    import ray
    from ray.data import TaskPoolStrategy

    def run(rows: dict[str, np.ndarray]) -> dict[str, Any]:
        block = ray.get(reader)(int(rows["id"][0]))
        # One row per chunk: a block is handed over whole, without per-sample bookkeeping.
        return {
            "values": block.values_P[None],
            "labels": block.labels_P[None],
            "keys": ["\n".join(block.keys)],
            "damaged": ["\n".join(block.damaged)],
            "delays": ["\n".join(block.delays)],
        }

    _quiet_and_ordered()
    ids = ray.data.from_items([{"id": chunk} for chunk in chunks], override_num_blocks=len(chunks))
    return list(ids.map_batches(run, batch_size=1, compute=TaskPoolStrategy(size=tasks)).materialize().to_arrow_refs())


def _quiet_and_ordered() -> None:
    from ray.data import DataContext

    context = DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False


def _reading_tasks(world: int) -> int:
    """Tasks that read for one worker: its share of the cluster's CPUs, less the one that computes."""
    import ray

    return max(1, min(8, int(ray.cluster_resources()["CPU"]) // world - 1))
