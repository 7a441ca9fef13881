"""The order in which training reads samples: pure functions of manifest, seed and epoch, for any number of workers.

    shards ─permuted by (seed, epoch)─▶ sequence of T samples ─cut─▶ `interleave` lanes, contiguous pieces
    lane ─blocks shuffled by (seed, epoch, lane, block)─▶ lane       lanes ─one sample of each in turn─▶ epoch

Example: 10 samples, `interleave` 3, `shuffle_block_size` 2. Numbers are positions in the sequence of permuted shards.

    sequence         0 1 2 3 4 5 6 7 8 9
    lanes            [0 1 2]  [3 4 5]  [6 7 8 9]             lengths 3, 3, 4: `min_lane_len` is 3
    blocks           [0 1][2] [3 4][5] [6 7][8 9]
    shuffled blocks  [1 0][2] [3 4][5] [7 6][8 9]            for some seed
    epoch            1 3 7 | 0 4 6 | 2 5 8 | 9               the last sample is the remainder of the longer lane

Epochs follow each other without a gap, so one number, the position, describes the progress of a run: position P is
sample P mod T of epoch P // T. Global batch b has the positions [b·G, (b+1)·G). Worker r of N reads every N-th of them,
starting with the r-th. A worker reads from `interleave` lanes, so it keeps few shards open.

Shape suffixes: P positions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from bsq_ray.runtime.random_streams import RandomStream, stream_rng


@dataclass(frozen=True, eq=False)
class Order:
    """The endless order of a data set.

    The cost of a position does not depend on the number of shards, except for the first position of an epoch.

    Args:
        shard_sizes: samples of each shard; a sequence or int64 (shards,).
        seed: seed of the run.
        interleave: number of lanes.
        shuffle_block_size: samples shuffled together inside a lane.
    """

    shard_sizes: Sequence[int] | np.ndarray
    seed: int
    interleave: int
    shuffle_block_size: int

    @cached_property
    def _shard_starts(self) -> np.ndarray:
        """Number of samples before each shard in manifest order, and T last; int64 (shards + 1,)."""
        return np.concatenate([[0], np.cumsum(self.shard_sizes)]).astype(np.int64)

    @property
    def num_samples(self) -> int:
        """Samples of an epoch (T)."""
        return int(self._shard_starts[-1])

    def at(self, positions_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the epoch and the sample at each position.

        Returns:
            epochs and samples, both int64 (P,); samples are numbered through the shards in manifest order.
        """
        epochs_P, offsets_P = np.divmod(positions_P.astype(np.int64), self.num_samples)
        samples_P = np.empty_like(offsets_P)
        for epoch in np.unique(epochs_P):
            mask_P = epochs_P == epoch
            samples_P[mask_P] = self._epoch_samples(int(epoch), offsets_P[mask_P])
        return epochs_P, samples_P

    def _epoch_samples(self, epoch: int, offsets_P: np.ndarray) -> np.ndarray:
        lane_P, element_P = self._lane_and_element(offsets_P)
        sequence_P = self._shuffled_position(epoch, lane_P, element_P)
        return self._to_manifest_order(epoch, sequence_P)

    def _lane_bounds(self) -> np.ndarray:
        """Return the first position of each lane in the sequence, and T last: int64 (interleave + 1,)."""
        return np.arange(self.interleave + 1) * self.num_samples // self.interleave

    def _lane_and_element(self, offsets_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the lane of each offset in the epoch, and the index in that lane before shuffling."""
        min_lane_len = self.num_samples // self.interleave
        lane_P, element_P = offsets_P % self.interleave, offsets_P // self.interleave
        # After the shortest lane ends, each longer lane has one more sample.
        longer_lanes = np.flatnonzero(np.diff(self._lane_bounds()) > min_lane_len)
        is_remainder_P = offsets_P >= min_lane_len * self.interleave
        lane_P[is_remainder_P] = longer_lanes[offsets_P[is_remainder_P] - min_lane_len * self.interleave]
        element_P[is_remainder_P] = min_lane_len
        return lane_P, element_P

    def _shuffled_position(self, epoch: int, lane_P: np.ndarray, element_P: np.ndarray) -> np.ndarray:
        """Return the position in the sequence of each lane element, after each block of a lane is shuffled."""
        bounds = self._lane_bounds()
        sequence_P = np.empty_like(lane_P)
        block_P = element_P // self.shuffle_block_size
        for lane, block in np.unique(np.stack([lane_P, block_P], 1), axis=0):
            mask_P = (lane_P == lane) & (block_P == block)
            first = int(block) * self.shuffle_block_size
            length = min(self.shuffle_block_size, int(bounds[lane + 1] - bounds[lane]) - first)
            shuffled = _permutation(length, RandomStream.BLOCK_ORDER, (self.seed, epoch, int(lane), int(block)))
            sequence_P[mask_P] = bounds[lane] + first + shuffled[element_P[mask_P] - first]
        return sequence_P

    def _to_manifest_order(self, epoch: int, sequence_P: np.ndarray) -> np.ndarray:
        """Convert positions in the sequence of permuted shards to samples in manifest order."""
        permuted = self._permuted_shards(epoch)
        slot_P = np.searchsorted(permuted.starts, sequence_P, side="right") - 1
        index_in_shard_P = sequence_P - permuted.starts[slot_P]
        return self._shard_starts[permuted.shards[slot_P]] + index_in_shard_P

    def _permuted_shards(self, epoch: int) -> _PermutedShards:
        """Return the shards of an epoch. Reading ahead alternates between two epochs, which are kept."""
        for permuted in tuple(self._epochs):
            if permuted.epoch == epoch:
                return permuted
        sizes = np.diff(self._shard_starts)
        shards = stream_rng(RandomStream.SHARD_ORDER, self.seed, epoch).permutation(len(sizes))
        permuted = _PermutedShards(epoch, shards, np.concatenate([[0], np.cumsum(sizes[shards])]))
        self._epochs.append(permuted)
        return permuted

    @cached_property
    def _epochs(self) -> deque[_PermutedShards]:
        return deque(maxlen=2)


@dataclass(frozen=True)
class _PermutedShards:
    """The shards of an epoch in their order, and the number of samples before each and of all."""

    epoch: int
    shards: np.ndarray
    starts: np.ndarray


def worker_positions(first: int, stop: int, batch_size: int, rank: int, world_size: int) -> np.ndarray:
    """Return the positions in [first, stop) that a worker reads.

    Args:
        first: a multiple of `batch_size`.
        stop: end of the range.
        batch_size: samples of a global batch.
        rank, world_size: the worker, and the number of workers.

    Returns:
        int64 (P,).

    Raises:
        ValueError: `batch_size` is not a multiple of `world_size`.
    """
    if batch_size % world_size:
        raise ValueError(f"batch_size {batch_size} cannot be split evenly among {world_size} workers; use a multiple")
    assert first % batch_size == 0, "a run stops between batches"
    return np.arange(first + rank, stop, world_size, dtype=np.int64)


@lru_cache(maxsize=256)
def _permutation(length: int, stream: RandomStream, key: tuple[int, ...]) -> np.ndarray:
    return stream_rng(stream, *key).permutation(length).astype(np.int64)
