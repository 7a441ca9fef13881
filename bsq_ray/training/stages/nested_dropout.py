"""Nested dropout of bits: the number of leading bits that each sample of a batch keeps (Rippel et al., ICML 2014).

    seed, step ─▶ numbers of all samples of the global batch ─▶ those of this worker's micro batches

The samples are those of one random stream by their position in the global batch. Every worker therefore knows the
numbers of all samples, without communication, and they do not depend on how the batch is split.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from bsq_ray.models.quantizers import KeptBits
from bsq_ray.runtime.collectives import num_workers, worker_rank
from bsq_ray.runtime.device import to_device
from bsq_ray.runtime.random_streams import RandomStream, stream_rng


class NestedDropout:
    """Samples numbers of kept bits: all bits with probability 1/2, otherwise one of the other numbers.

    Args:
        keep: numbers of bits, ascending; the last one is all bits (L).
        seed: seed of the run.
        across_workers: whether the codebook entropy is over the global batch, or over the worker's own part.
    """

    def __init__(self, keep: tuple[int, ...], seed: int, across_workers: bool) -> None:
        self.keep, self._seed, self._across_workers = keep, seed, across_workers

    def sample(self, micro_batch_sizes: Sequence[int], step: int, device: torch.device) -> list[KeptBits]:
        """Return the kept bits of each of this worker's micro batches, on the device.

        Args:
            micro_batch_sizes: samples of each micro batch.
            step: steps taken, from 0.
        """
        world_size, num_parts = num_workers(), len(micro_batch_sizes)
        all_kept_B = sample_num_kept(self.keep, self._seed, step, sum(micro_batch_sizes) * world_size)
        # Workers split the global batch by stride, and so do micro batches.
        own_kept_B = all_kept_B[worker_rank() :: world_size]
        entropy_kept_B = all_kept_B if self._across_workers else own_kept_B
        share_L = (entropy_kept_B[:, None] > np.arange(self.keep[-1])).mean(0)
        share_L_on_device = to_device(torch.from_numpy(share_L).float(), device)
        return [
            KeptBits(to_device(torch.from_numpy(own_kept_B[part::num_parts].copy()), device), share_L_on_device)
            for part in range(num_parts)
        ]


def sample_num_kept(keep: Sequence[int], seed: int, step: int, batch_size: int) -> np.ndarray:
    """Return the number of bits that each sample of a global batch keeps, int64 (batch_size,).

    A number depends on the seed, the step and the position of the sample in the global batch only.
    """
    uniform_B = stream_rng(RandomStream.KEPT_BITS, seed, step).random(batch_size)
    num_smaller = len(keep) - 1
    # The lower half of [0, 1) is divided evenly among the smaller numbers.
    index_B = np.minimum((uniform_B * 2 * num_smaller).astype(np.int64), num_smaller)
    return np.asarray(keep, np.int64)[index_B]
