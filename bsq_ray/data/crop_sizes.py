"""Training crops of several sizes in one run: each global batch has crops of one height and width.

    position ─▶ batch ─order of the sizes─▶ size of its crops ─┐
             └─order of the data set─▶ epoch, sample ──────────┴▶ crops (P, 3, H, W) or (P, 3, T, H, W)

The size of a batch is a pure function of the seed and the number of the batch, so resumed runs and runs of any number
of workers train on the same crops. Of every 1,024 batches each size has its share, shuffled.

Shape suffixes: P positions or samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bsq_ray import config
from bsq_ray.data.batch_mixture import BatchMixtureOrder, BatchMixtureSource
from bsq_ray.data.clip_source import ClipSource
from bsq_ray.data.data_source import DataSource, SampleBlock
from bsq_ray.data.image_source import ImageSource
from bsq_ray.data.mixture import MixtureOrder, MixtureSource, share_ends, split_positions
from bsq_ray.data.order import Order
from bsq_ray.runtime.random_streams import RandomStream

PixelSource = ImageSource | ClipSource | MixtureSource | BatchMixtureSource


class CropSizeSource(DataSource):
    """A data set of images or clips, numbered once for each size of crops.

    Args:
        samples: the data set, or a mixture of data sets.
        crop_sizes: heights and widths, pixels.
        batch_size: samples of a global batch.
    """

    max_batches_per_read = 1

    def __init__(self, samples: PixelSource, crop_sizes: tuple[tuple[int, int], ...], batch_size: int) -> None:
        self.url, self.hash, self.notes = samples.url, samples.hash, samples.notes
        self._samples, self._batch_size = samples, batch_size
        self._sources = tuple(_with_crop(samples, crop_hw) for crop_hw in crop_sizes)
        self.sample_bytes = max(source.sample_bytes for source in self._sources)

    @property
    def shard_sizes(self) -> np.ndarray:
        """Images or clips of each shard."""
        return self._samples.shard_sizes

    @property
    def evaluated(self) -> DataSource:
        """The images or clips as center squares."""
        return self._samples.evaluated

    def order(self, seed: int, data_config: config.DataOrderConfig) -> CropSizeOrder:  # type: ignore[override]
        """Return the order in which training reads the data set."""
        unit_ends = share_ends([1] * len(self._sources))
        order = self._samples.order(seed, data_config)
        return CropSizeOrder(order, self.num_samples, unit_ends, seed, self._batch_size)

    def read(self, samples_P: np.ndarray, epochs_P: np.ndarray, seed: int) -> SampleBlock:
        """Read crops of one batch, uint8 (P, 3, H, W) or (P, 3, T, H, W)."""
        size_P, sample_P = np.divmod(samples_P, self.num_samples)
        assert (size_P == size_P[0]).all(), "a batch has crops of one size"
        return self._sources[int(size_P[0])].read(sample_P, epochs_P, seed)

    def read_eval(self, samples: range) -> SampleBlock:
        """Read center squares."""
        return self._samples.read_eval(samples)


def _with_crop(source: DataSource, crop_hw: tuple[int, int]) -> PixelSource:
    """Return the same images or clips with training crops of another height and width."""
    if isinstance(source, MixtureSource):
        return _mixture_with_crop(source, crop_hw)
    if isinstance(source, BatchMixtureSource):
        images, clips = (_mixture_with_crop(each, crop_hw) for each in (source.images, source.clips))
        return BatchMixtureSource(images, clips, source.batch_size)
    assert isinstance(source, ImageSource | ClipSource)
    return source.with_crop(crop_hw)


def _mixture_with_crop(mixture: MixtureSource, crop_hw: tuple[int, int]) -> MixtureSource:
    return MixtureSource(mixture.url, [_with_crop(each, crop_hw) for each in mixture.sources], mixture.weights)


@dataclass(frozen=True)
class CropSizeOrder:
    """The endless order of images or clips, numbered once for each size of crops.

    Args:
        samples: order of the images or clips.
        num_samples: number of images or clips.
        unit_ends: cumulative shares of the sizes, see `share_ends`.
        seed: seed of the run.
        batch_size: samples of a global batch.
    """

    samples: Order | MixtureOrder | BatchMixtureOrder
    num_samples: int
    unit_ends: tuple[int, ...]
    seed: int
    batch_size: int

    def at(self, positions_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the epoch and the sample at each position, both int64 (P,)."""
        size_P, _ = split_positions(positions_P // self.batch_size, self.unit_ends, RandomStream.CROP_SIZE, self.seed)
        epochs_P, samples_P = self.samples.at(positions_P)
        return epochs_P, size_P * self.num_samples + samples_P
