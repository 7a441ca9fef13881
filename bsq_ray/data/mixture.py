"""Several data sets in one run, each with a weight.

    position ─order of the mixture─▶ data set, position in it ─its own order─▶ epoch, sample

The order is a pure function of the weights and the seed. Of every `_BLOCK` positions each data set has its share,
shuffled; the share is exact over all blocks together. Each data set has epochs of its own.

Shape suffixes: P positions or samples, K positions of a block.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import yaml
from pydantic import Field, model_validator

from bsq_ray import config, storage
from bsq_ray.config.base import StrictModel
from bsq_ray.config.loader import load_yaml_as
from bsq_ray.data.data_source import DataSource, SampleBlock
from bsq_ray.data.order import Order
from bsq_ray.data.token_table import TokenSource
from bsq_ray.runtime.random_streams import RandomStream, stream_rng

# Positions that are shuffled together.
_BLOCK = 1024
# Weights are integers in units of 2^-30, so that shares are exact.
_UNITS = 2**30


class WeightedDataset(StrictModel):
    """A data set of a mixture."""

    url: str = Field(min_length=1, description="Folder or URL; a relative path starts at the folder of the file.")
    weight: float | None = Field(
        None, gt=0, description="Share of the samples, relative to the other weights; null in all of them: its size."
    )


class Mixture(StrictModel):
    """Data sets that a run reads together, from a YAML file."""

    datasets: tuple[WeightedDataset, ...] = Field(
        min_length=1, description="Data sets of one kind; for a causal video tokenizer videos, or videos and images."
    )

    @model_validator(mode="after")
    def _check_weights(self) -> Mixture:
        if len({dataset.weight is None for dataset in self.datasets}) > 1:
            raise ValueError("give every data set a weight, or none of them")
        if len({dataset.url for dataset in self.datasets}) < len(self.datasets):
            raise ValueError("a data set is listed twice; list it once and add the weights")
        return self


def is_mixture(url: str) -> bool:
    """Return True if a data URL is the YAML file of a mixture."""
    return url.endswith((".yaml", ".yml"))


def read_mixture(url: str) -> Mixture:
    """Read the file of a mixture; relative paths in it become absolute.

    Raises:
        ValueError: the file is missing, not YAML, or has wrong keys or values.
    """
    mixture = load_yaml_as(url, Mixture)
    folder = storage.absolute(url).rpartition("/")[0]
    # An absolute path or a URL with a scheme replaces the folder.
    urls = [each.url if "://" in each.url else storage.join(folder, each.url) for each in mixture.datasets]
    datasets = tuple(
        each.model_copy(update={"url": storage.absolute(resolved)})
        for each, resolved in zip(mixture.datasets, urls, strict=True)
    )
    return mixture.model_copy(update={"datasets": datasets})


def store_mixture(url: str, destination: str) -> str:
    """Write the file of a mixture with absolute paths, where all workers can read it; return its URL."""
    text = yaml.safe_dump(read_mixture(url).model_dump(mode="json"), sort_keys=False)
    storage.write_bytes(destination, text.encode())
    return destination


class MixtureSource(DataSource):
    """Samples of several data sets, numbered through all of them.

    Args:
        url: file of the mixture.
        sources: the data sets.
        weights: positive shares; None means the number of samples.
    """

    def __init__(self, url: str, sources: Sequence[DataSource], weights: Sequence[float] | None) -> None:
        self.url, self.sources = url, tuple(sources)
        self.notes = tuple(note for source in sources for note in source.notes)
        self.sample_bytes = max(source.sample_bytes for source in sources)
        self.weights = tuple(weights or [source.num_samples for source in sources])
        parts = [[source.hash, weight] for source, weight in zip(sources, self.weights, strict=True)]
        self.hash = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        self._starts = np.cumsum([0, *(source.num_samples for source in sources)])

    @property
    def shard_sizes(self) -> np.ndarray:
        """Samples of each shard of all data sets."""
        return np.concatenate([source.shard_sizes for source in self.sources])

    @property
    def num_samples(self) -> int:
        """Samples of all data sets together."""
        return int(self._starts[-1])

    @property
    def tokenizer_url(self) -> str:
        """Model folder of the tokenizer of all token tables.

        Raises:
            ValueError: the data sets are not token tables.
        """
        source = self.sources[0]
        if not isinstance(source, TokenSource):
            raise ValueError(f"{source.url} is not a token table")
        return source.tokenizer_url

    def order(self, seed: int, data_config: config.DataOrderConfig) -> MixtureOrder:  # type: ignore[override]
        """Return the order in which training reads the data sets."""
        orders = [
            Order(source.shard_sizes, seed, data_config.interleave, data_config.shuffle_block_size)
            for source in self.sources
        ]
        return MixtureOrder(tuple(orders), share_ends(self.weights), seed)

    def read(self, samples_P: np.ndarray, epochs_P: np.ndarray, seed: int) -> SampleBlock:
        """Read samples of all data sets; their randomness is that of a run of their data set alone."""
        source_P = np.searchsorted(self._starts, samples_P, side="right") - 1
        keys = [""] * len(samples_P)
        values_P, labels_P = np.empty(0, np.uint8), np.empty(len(samples_P), np.int64)
        block = SampleBlock(values_P, labels_P, keys)
        for number in np.unique(source_P).tolist():
            rows = np.flatnonzero(source_P == number)
            part = self.sources[number].read(samples_P[rows] - self._starts[number], epochs_P[rows], seed)
            if not len(block.values_P):
                block.values_P = np.empty((len(samples_P), *part.values_P.shape[1:]), np.uint8)
            block.values_P[rows], labels_P[rows] = part.values_P, part.labels_P
            for row, key in zip(rows.tolist(), part.keys, strict=True):
                keys[row] = key
            self._add_reports(block, part, number)
        return block

    def read_eval(self, samples: range) -> SampleBlock:
        """Read evaluation samples of all data sets."""
        blocks = []
        for number, source in enumerate(self.sources):
            first = int(self._starts[number])
            num_before = max(0, -(-(first - samples.start) // samples.step))
            start = samples.start + num_before * samples.step - first
            local = range(start, min(samples.stop - first, source.num_samples), samples.step)
            if local:
                blocks.append((number, source.read_eval(local)))
        values_P = [part.values_P for _, part in blocks if part.keys] or [blocks[0][1].values_P]
        labels_P = np.concatenate([part.labels_P for _, part in blocks])
        block = SampleBlock(np.concatenate(values_P), labels_P, [key for _, part in blocks for key in part.keys])
        for number, part in blocks:
            self._add_reports(block, part, number)
        return block

    def _add_reports(self, block: SampleBlock, part: SampleBlock, number: int) -> None:
        block.skipped += [storage.join(self.sources[number].url, line) for line in part.skipped]
        block.retries += part.retries


@dataclass(frozen=True)
class MixtureOrder:
    """The endless order of a mixture.

    Args:
        orders: order of each data set.
        unit_ends: cumulative shares of the data sets, see `share_ends`.
        seed: seed of the run.
    """

    orders: tuple[Order, ...]
    unit_ends: tuple[int, ...]
    seed: int

    def at(self, positions_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the epoch and the sample at each position.

        Returns:
            epochs and samples, both int64 (P,); samples are numbered through the data sets.
        """
        epochs_P, samples_P = np.empty_like(positions_P), np.empty_like(positions_P)
        source_P, local_P = split_positions(positions_P, self.unit_ends, RandomStream.MIXTURE_ORDER, self.seed)
        first = 0
        for number, order in enumerate(self.orders):
            rows = np.flatnonzero(source_P == number)
            if len(rows):
                epochs_P[rows], local_samples_P = order.at(local_P[rows])
                samples_P[rows] = first + local_samples_P
            first += order.num_samples
        return epochs_P, samples_P


def share_ends(weights: Sequence[float]) -> tuple[int, ...]:
    """Return the cumulative shares of positive weights in units of 2^-30; the last is 2^30."""
    return tuple(np.rint(np.cumsum(weights) / np.sum(weights) * _UNITS).astype(np.int64).tolist())


def split_positions(
    positions_P: np.ndarray, unit_ends: tuple[int, ...], stream: RandomStream, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the part of each position, and its position in this part; both int64 (P,).

    Args:
        positions_P: positions, int64 (P,).
        unit_ends: cumulative shares of the parts.
        stream: stream of the random order in a block of 1,024 positions.
        seed: seed of the run.
    """
    source_P, local_P = np.empty_like(positions_P), np.empty_like(positions_P)
    block_P, slot_P = np.divmod(positions_P, _BLOCK)
    for block in np.unique(block_P).tolist():
        rows = np.flatnonzero(block_P == block)
        source_K, local_K = _split_block(unit_ends, stream, seed, block)
        source_P[rows], local_P[rows] = source_K[slot_P[rows]], local_K[slot_P[rows]]
    return source_P, local_P


@lru_cache(64)
def _split_block(
    unit_ends: tuple[int, ...], stream: RandomStream, seed: int, block: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the data set of each position of a block, and its position in this data set; both int64 (K,)."""
    # Python's integers do not overflow.
    starts, stops = (
        np.diff([0, *(number * _BLOCK * end // _UNITS for end in unit_ends)]) for number in (block, block + 1)
    )
    source_K = np.repeat(np.arange(len(unit_ends)), stops - starts)
    source_K = stream_rng(stream, seed, block).permutation(source_K)
    local_K = np.empty_like(source_K)
    for number, start in enumerate(starts.tolist()):
        is_source_K = source_K == number
        local_K[is_source_K] = start + np.arange(np.count_nonzero(is_source_K))
    return source_K, local_K
