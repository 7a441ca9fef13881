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
    lanes: int
    window: int

    @property
    def samples(self) -> int:
        """Samples of an epoch (T)."""
        return sum(self.shard_sizes)

    def at(self, positions_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Epoch and sample (numbered through the shards in manifest order) at each position, both int64 (P,)."""
        epochs_P, offsets_P = np.divmod(positions_P.astype(np.int64), self.samples)
        samples_P = np.empty_like(offsets_P)
        for epoch in np.unique(epochs_P):
            here_P = epochs_P == epoch
            samples_P[here_P] = self._epoch(int(epoch), offsets_P[here_P])
        return epochs_P, samples_P

    def _epoch(self, epoch: int, offsets_P: np.ndarray) -> np.ndarray:
        bounds = np.arange(self.lanes + 1) * self.samples // self.lanes
        shortest = self.samples // self.lanes
        longer = np.flatnonzero(np.diff(bounds) > shortest)
        lane_P, element_P = offsets_P % self.lanes, offsets_P // self.lanes
        left_over_P = offsets_P >= shortest * self.lanes
        lane_P[left_over_P] = longer[offsets_P[left_over_P] - shortest * self.lanes]
        element_P[left_over_P] = shortest
        sequence_P = np.empty_like(offsets_P)
        window_P = element_P // self.window
        for lane, window in np.unique(np.stack([lane_P, window_P], 1), axis=0):
            here_P = (lane_P == lane) & (window_P == window)
            first = int(window) * self.window
            length = min(self.window, int(bounds[lane + 1] - bounds[lane]) - first)
            shuffled = _permutation(length, (self.seed, epoch, int(lane), int(window)))
            sequence_P[here_P] = bounds[lane] + first + shuffled[element_P[here_P] - first]
        return self._samples_of(epoch, sequence_P)

    def _samples_of(self, epoch: int, sequence_P: np.ndarray) -> np.ndarray:
        """From places in the epoch's sequence of permuted shards to samples in manifest order."""
        sizes = np.array(self.shard_sizes, np.int64)
        shard_order = _permutation(len(sizes), (self.seed, epoch))
        ends = np.cumsum(sizes[shard_order])
        slot_P = np.searchsorted(ends, sequence_P, side="right")
        shard_P = shard_order[slot_P]
        within_P = sequence_P - (ends[slot_P] - sizes[shard_P])
        return (np.cumsum(sizes) - sizes)[shard_P] + within_P


def worker_positions(first: int, stop: int, batch_size: int, rank: int, world: int) -> np.ndarray:
    """Positions in [first, stop) that worker `rank` of `world` takes; `first` is a multiple of `batch_size`.

    Raises:
        ValueError: the workers cannot share a batch evenly.
    """
    if batch_size % world:
        raise ValueError(f"batch_size {batch_size} cannot be shared evenly by {world} workers; choose a multiple")
    assert first % batch_size == 0, "a run stops between batches"
    return np.arange(first + rank, stop, world, dtype=np.int64)


@lru_cache(maxsize=256)
def _permutation(length: int, key: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(key).permutation(length).astype(np.int64)
