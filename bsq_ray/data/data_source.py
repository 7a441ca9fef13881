"""What training and evaluation read from: photographs, clips, or tokens made of photographs.

Shape suffixes: B samples of a batch, P places in the order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor


@dataclass
class SampleBlock:
    """Samples as they are read.

    Attributes:
        values_P: uint8: images (P, 3, H, W), clips (P, 3, T, H, W), or the packed bits of tokens (P, N, bytes).
        labels_P: int64.
        keys: names of the samples.
        damaged: "shard: key: reason" of each sample that could not be read and was replaced or left out.
        delays: what storage failed with before it could be read.
    """

    values_P: np.ndarray
    labels_P: np.ndarray
    keys: list[str]
    skipped: list[str] = field(default_factory=list)
    retries: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Batch:
    """One worker's share of a batch; `values_B` and `labels_B` as in `Samples`."""

    values_B: Tensor
    labels_B: Tensor
    keys: list[str]

    def subset(self, rows: slice) -> Batch:
        """Some of its samples."""
        return Batch(self.values_B[rows], self.labels_B[rows], self.keys[rows])


class DataSource(ABC):
    """A data set that can be read in any order.

    Attributes:
        url: where it is.
        hash: SHA-256 that names its content.
        shard_sizes: samples of each shard.
        sample_bytes: of one sample's values.
        notes: what a person should know who reads from it.
    """

    url: str
    hash: str
    shard_sizes: tuple[int, ...]
    sample_bytes: int
    notes: tuple[str, ...] = ()

    @property
    def num_samples(self) -> int:
        """Samples of all shards together."""
        return sum(self.shard_sizes)

    @abstractmethod
    def read(self, samples_P: np.ndarray, epochs_P: np.ndarray, seed: int) -> SampleBlock:
        """Samples, by their numbers through all shards, as training sees them.

        What is random about a sample depends on its number, its epoch and the seed only.

        Raises:
            RuntimeError: no sample of a shard can be read.
        """

    @abstractmethod
    def read_eval(self, samples: range) -> SampleBlock:
        """Samples as evaluation sees them; those that cannot be read are left out."""
