"""Images and clips in one run: each global batch has samples of one kind.

    position ─▶ batch, row ─kind of the batch─▶ images: batch among those of images, row ─▶ order of the image data sets
                                            └▶ clips:  batch among those of clips, row  ─▶ order of the video data sets

The kind of a batch is a pure function of the weights, the seed and the number of the batch. Of every 1,024 batches each
kind has its share of the weights, shuffled. Images are clips of one frame.

Shape suffixes: P positions or samples.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import numpy as np

from bsq_ray import config
from bsq_ray.data.data_source import DataSource, SampleBlock
from bsq_ray.data.mixture import MixtureOrder, MixtureSource, share_ends, split_positions
from bsq_ray.runtime.random_streams import RandomStream


class BatchMixtureSource(DataSource):
    """Samples of image data sets, then those of video data sets, numbered through all of them.

    Args:
        images: the image data sets.
        clips: the video data sets.
        batch_size: samples of a global batch.
    """

    max_batches_per_read = 1

    def __init__(self, images: MixtureSource, clips: MixtureSource, batch_size: int) -> None:
        self.images, self.clips, self.batch_size = images, clips, batch_size
        self.url, self.notes, self.sample_bytes = clips.url, images.notes + clips.notes, clips.sample_bytes
        self.hash = hashlib.sha256(json.dumps([images.hash, clips.hash, self._weights]).encode()).hexdigest()

    @property
    def shard_sizes(self) -> np.ndarray:
        """Samples of each shard of all data sets."""
        return np.concatenate([self.images.shard_sizes, self.clips.shard_sizes])

    @property
    def evaluated(self) -> DataSource:
        """The video data sets: the model is one of clips."""
        return self.clips

    @property
    def _weights(self) -> list[float]:
        return [sum(self.images.weights), sum(self.clips.weights)]

    def order(self, seed: int, data_config: config.DataOrderConfig) -> BatchMixtureOrder:  # type: ignore[override]
        """Return the order in which training reads the data sets."""
        orders = tuple(source.order(seed, data_config) for source in (self.images, self.clips))
        return BatchMixtureOrder(orders, self.images.num_samples, share_ends(self._weights), seed, self.batch_size)

    def read(self, samples_P: np.ndarray, epochs_P: np.ndarray, seed: int) -> SampleBlock:
        """Read the samples of one batch: images (P, 3, 1, size, size) or clips (P, 3, T, size, size)."""
        num_images = self.images.num_samples
        is_image_P = samples_P < num_images
        if not is_image_P.any():
            return self.clips.read(samples_P - num_images, epochs_P, seed)
        assert is_image_P.all(), "a batch has samples of one kind"
        block = self.images.read(samples_P, epochs_P, seed)
        block.values_P = block.values_P[:, :, None]
        return block

    def read_eval(self, samples: range) -> SampleBlock:
        """Raise, because evaluations read `evaluated`."""
        raise AssertionError("evaluations read the clips alone")


@dataclass(frozen=True)
class BatchMixtureOrder:
    """The endless order of images and clips.

    Args:
        orders: order of the images, and of the clips.
        num_images: samples of the image data sets.
        unit_ends: cumulative shares of both kinds, see `share_ends`.
        seed: seed of the run.
        batch_size: samples of a global batch.
    """

    orders: tuple[MixtureOrder, ...]
    num_images: int
    unit_ends: tuple[int, ...]
    seed: int
    batch_size: int

    def at(self, positions_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the epoch and the sample at each position, both int64 (P,)."""
        batch_P, row_P = np.divmod(positions_P, self.batch_size)
        kind_P, batch_of_kind_P = split_positions(batch_P, self.unit_ends, RandomStream.BATCH_KIND, self.seed)
        local_P = batch_of_kind_P * self.batch_size + row_P
        epochs_P, samples_P = np.empty_like(positions_P), np.empty_like(positions_P)
        for kind, (order, first) in enumerate(zip(self.orders, (0, self.num_images), strict=True)):
            rows = np.flatnonzero(kind_P == kind)
            if len(rows):
                epochs_P[rows], samples_of_kind_P = order.at(local_P[rows])
                samples_P[rows] = first + samples_of_kind_P
        return epochs_P, samples_P
