"""The interface of everything that training and evaluation read: images, clips, or tokens.

Shape suffixes: B samples of a batch, P samples of a block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from bsq_ray import config
from bsq_ray.data.order import Order


@dataclass
class SampleBlock:
    """Samples that were read together.

    Attributes:
        values_P: uint8: images (P, 3, H, W), clips (P, 3, T, H, W), or packed bits of tokens (P, bytes).
        labels_P: int64 (P,).
        keys: names of the samples.
        skipped: "shard: key: reason" of each unreadable sample that was replaced or left out.
        retries: messages of storage errors before a retry succeeded.
    """

    values_P: np.ndarray
    labels_P: np.ndarray
    keys: list[str]
    skipped: list[str] = field(default_factory=list)
    retries: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Batch:
    """The part of a global batch that one worker reads; values and labels as in `SampleBlock`."""

    values_B: Tensor
    labels_B: Tensor
    keys: list[str]

    def subset(self, rows: slice) -> Batch:
        """Return a batch of some samples."""
        return Batch(self.values_B[rows], self.labels_B[rows], self.keys[rows])


class DataSource(ABC):
    """A data set that can be read in any order.

    Attributes:
        url: folder of the data set.
        hash: SHA-256 of its content.
        shard_sizes: samples of each shard, int64 (shards,).
        sample_bytes: size of one sample's values.
        notes: warnings to show to the user.
        max_batches_per_read: largest number of global batches whose samples `read` can combine; None: any number.
    """

    url: str
    hash: str
    sample_bytes: int
    notes: tuple[str, ...] = ()
    max_batches_per_read: int | None = None

    @property
    @abstractmethod
    def shard_sizes(self) -> np.ndarray:
        """Samples of each shard."""

    @property
    def num_samples(self) -> int:
        """Samples of all shards together."""
        return int(self.shard_sizes.sum())

    @property
    def evaluated(self) -> DataSource:
        """Return the part of the data set that evaluations read."""
        return self

    def order(self, seed: int, data_config: config.DataOrderConfig) -> Order:
        """Return the order in which training reads the data set."""
        return Order(self.shard_sizes, seed, data_config.interleave, data_config.shuffle_block_size)

    @abstractmethod
    def read(self, samples_P: np.ndarray, epochs_P: np.ndarray, seed: int) -> SampleBlock:
        """Read training samples; their randomness depends only on sample, epoch and seed.

        Args:
            samples_P: numbers of the samples through all shards, int64 (P,).
            epochs_P: epoch of each sample, int64 (P,).
            seed: seed of the run.

        Raises:
            RuntimeError: no sample of a shard can be read.
        """

    @abstractmethod
    def read_eval(self, samples: range) -> SampleBlock:
        """Read evaluation samples; unreadable ones are left out."""
