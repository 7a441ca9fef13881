"""Bit noise: random flips of bits between quantizer and decoder (Qiu et al., "Robust Latent Matters", 2025).

    seed, step, position in the global batch ─▶ probability of the sample ─▶ flipped bits

A generator samples wrong tokens at times, and a decoder that was trained on correct ones alone amplifies them. Each
worker knows the flips of its samples without communication, and they do not depend on how the batch is split.

Shape suffixes: B images or clips, N tokens, L bits of a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from bsq_ray import config
from bsq_ray.runtime.collectives import num_workers, worker_rank
from bsq_ray.runtime.device import to_device
from bsq_ray.runtime.random_streams import RandomStream, stream_rng


class BitNoise:
    """Samples the bits that flip in each sample of a batch.

    Args:
        noise_config: share of images, and their flip probabilities.
        seed: seed of the run.
    """

    def __init__(self, noise_config: config.BitNoiseConfig, seed: int) -> None:
        self._config, self._seed = noise_config, seed

    def max_rate(self, progress: float) -> float:
        """Return the highest flip probability at a fraction of the run, which falls linearly to 0."""
        until = self._config.until
        return self._config.rate * max(0.0, 1 - progress / until) if until else 0.0

    def sample(
        self, token_shapes: Sequence[tuple[int, int, int]], step: int, progress: float, device: torch.device
    ) -> list[Tensor | None]:
        """Return the bits that flip in each of this worker's micro batches, bool (B, N, L) on the device.

        Args:
            token_shapes: (B, N, L) of each micro batch.
            step: steps taken, from 0.
            progress: fraction of the run that is done, by steps or by time.

        Returns:
            A mask for each micro batch; None for all if no bit can flip at this step.
        """
        max_rate = self.max_rate(progress)
        if not max_rate * self._config.images:
            return [None] * len(token_shapes)
        num_parts, world_size, rank = len(token_shapes), num_workers(), worker_rank()
        masks: list[Tensor | None] = []
        for part, (num_samples, *shape) in enumerate(token_shapes):
            # Workers split the global batch by stride, and so do micro batches.
            positions = [rank + world_size * (part + num_parts * index) for index in range(num_samples)]
            flips = [
                sample_flips(self._seed, step, position, (shape[0], shape[1]), self._config.images, max_rate)
                for position in positions
            ]
            masks.append(to_device(torch.from_numpy(np.stack(flips)), device))
        return masks


def sample_flips(
    seed: int, step: int, position: int, shape: tuple[int, int], images: float, max_rate: float
) -> np.ndarray:
    """Return the bits that flip in a sample, bool (N, L): a pure function of the arguments.

    Args:
        position: index of the sample in the global batch.
        images: probability that any bit of a sample may flip.
        max_rate: the flip probability of such a sample is uniform between 0 and this.
    """
    rng = stream_rng(RandomStream.BIT_NOISE, seed, step, position)
    rate = max_rate * rng.random() if rng.random() < images else 0.0
    return rng.random(shape, np.float32) < rate if rate else np.zeros(shape, bool)
