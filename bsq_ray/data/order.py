"""The order in which training sees the samples: pure functions of (manifest, seed, epoch), whatever the workers.

    shards ─permuted by (seed, epoch)─▶ one sequence of T samples ─cut─▶ `lanes` contiguous pieces
    piece ─windows shuffled by (seed, epoch, lane, window)─▶ lane        lanes ─taken in turn─▶ order of the epoch

Epochs follow each other without a gap, so a single number, the position, says how far a run has come: position P is
sample P mod T of epoch P // T. Global batch b is positions [b·G, (b+1)·G), of which worker r of N takes every N-th one
starting with the r-th. Reading follows the lanes, so a worker keeps few shards open; nothing is lost or repeated.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class Order:
    """The endless order of a data set.

    Args:
        shard_sizes: samples of each shard.
        seed: seed of the run.
        lanes: places of the epoch that are read at once.
        window: samples shuffled together inside a lane.
    """

    shard_sizes: tuple[int, ...]
    seed: int
    interleave: int
    shuffle_block_size: int

    @property
    def num_samples(self) -> int:
        """Samples of an epoch (T)."""
        return sum(self.shard_sizes)

    def at(self, positions_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Epoch and sample (numbered through the shards in manifest order) at each position, both int64 (P,)."""
        epochs_P, offsets_P = np.divmod(positions_P.astype(np.int64), self.num_samples)
        samples_P = np.empty_like(offsets_P)
        for epoch in np.unique(epochs_P):
            mask_P = epochs_P == epoch
            samples_P[mask_P] = self._epoch_samples(int(epoch), offsets_P[mask_P])
        return epochs_P, samples_P

    def _epoch_samples(self, epoch: int, offsets_P: np.ndarray) -> np.ndarray:
        bounds = np.arange(self.interleave + 1) * self.num_samples // self.interleave
        shortest = self.num_samples // self.interleave
        longer_streams = np.flatnonzero(np.diff(bounds) > shortest)
        stream_P, element_P = offsets_P % self.interleave, offsets_P // self.interleave
        remainder_P = offsets_P >= shortest * self.interleave
        stream_P[remainder_P] = longer_streams[offsets_P[remainder_P] - shortest * self.interleave]
        element_P[remainder_P] = shortest
        sequence_P = np.empty_like(offsets_P)
        block_P = element_P // self.shuffle_block_size
        for stream, block in np.unique(np.stack([stream_P, block_P], 1), axis=0):
            mask_P = (stream_P == stream) & (block_P == block)
            first = int(block) * self.shuffle_block_size
            length = min(self.shuffle_block_size, int(bounds[stream + 1] - bounds[stream]) - first)
            shuffled = _permutation(length, (self.seed, epoch, int(stream), int(block)))
            sequence_P[mask_P] = bounds[stream] + first + shuffled[element_P[mask_P] - first]
        return self._to_manifest_order(epoch, sequence_P)

    def _to_manifest_order(self, epoch: int, sequence_P: np.ndarray) -> np.ndarray:
        """From places in the epoch's sequence of permuted shards to samples in manifest order."""
        sizes = np.array(self.shard_sizes, np.int64)
        shard_order = _permutation(len(sizes), (self.seed, epoch))
        ends = np.cumsum(sizes[shard_order])
        slot_P = np.searchsorted(ends, sequence_P, side="right")
        shard_P = shard_order[slot_P]
        within_P = sequence_P - (ends[slot_P] - sizes[shard_P])
        return (np.cumsum(sizes) - sizes)[shard_P] + within_P


def worker_positions(first: int, stop: int, batch_size: int, rank: int, world_size: int) -> np.ndarray:
    """Positions in [first, stop) that worker `rank` of `world` takes; `first` is a multiple of `batch_size`.

    Raises:
        ValueError: the workers cannot share a batch evenly.
    """
    if batch_size % world_size:
        raise ValueError(f"batch_size {batch_size} cannot be shared evenly by {world_size} workers; choose a multiple")
    assert first % batch_size == 0, "a run stops between batches"
    return np.arange(first + rank, stop, world_size, dtype=np.int64)


@lru_cache(maxsize=256)
def _permutation(length: int, key: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(key).permutation(length).astype(np.int64)
