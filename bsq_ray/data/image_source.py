"""Packed images as a data source: random crops for training, center squares for evaluation.

    samples ─fetch─▶ files ─decode, or the next readable one─▶ RGB ─crop─▶ block

Shape suffixes: P samples, H and W pixels.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import numpy as np
from PIL import Image

from bsq_ray import config, storage
from bsq_ray.data.data_source import DataSource, SampleBlock
from bsq_ray.data.file_cache import open_shard_cache
from bsq_ray.data.manifest import Manifest
from bsq_ray.data.sample_index import SampleEntry
from bsq_ray.data.shard_reader import SampleLocation, decode_blob, fetch_located, locate_samples
from bsq_ray.data.transforms import eval_transform, train_transform
from bsq_ray.runtime.random_streams import RandomStream, stream_rng


class ImageSource(DataSource):
    """Crops of the images of a manifest: squares, or for training of another size, see `with_crop`.

    Args:
        manifest: a data set of images.
        data_config: crop, flip and interpolation.
        size: side of a square, pixels.
        timeout_s: seconds to retry unavailable storage before a sample counts as damaged.

    Attributes:
        crop_hw: height and width of a training crop, pixels.
    """

    def __init__(self, manifest: Manifest, data_config: config.DataConfig, size: int, timeout_s: float = 0.0) -> None:
        self.manifest, self.data_config, self.size, self.timeout_s = manifest, data_config, size, timeout_s
        self.url, self.hash, self.cache = manifest.url, manifest.hash, open_shard_cache(data_config)
        self.crop_hw = (size, size)
        self.sample_bytes = 3 * size**2

    def with_crop(self, crop_hw: tuple[int, int]) -> ImageSource:
        """Return the same images with training crops of another height and width."""
        source = copy.copy(self)
        source.crop_hw, source.sample_bytes = crop_hw, 3 * crop_hw[0] * crop_hw[1]
        return source

    @property
    def shard_sizes(self) -> np.ndarray:
        """Images of each shard."""
        return self.manifest.shard_sizes

    def read(self, samples_P: np.ndarray, epochs_P: np.ndarray, seed: int) -> SampleBlock:
        """Read random crops, uint8 (P, 3, H, W).

        A damaged image is replaced by the next readable one of its shard, so that batches stay full for any reader.
        """
        block = SampleBlock(np.empty(0, np.uint8), np.empty(0, np.int64), [])
        crops, labels = [], []
        samples = samples_P.tolist()
        locations, blobs = self._fetch(samples, block)
        for sample, epoch, location, blob in zip(samples, epochs_P.tolist(), locations, blobs, strict=True):
            image, entry = self._first_readable(location, blob, block.skipped)
            crops.append(self._random_crop(image, sample, epoch, seed))
            labels.append(entry.label)
            block.keys.append(entry.key)
        block.values_P, block.labels_P = np.stack(crops), np.array(labels, np.int64)
        return block

    def _random_crop(self, image: Image.Image, sample: int, epoch: int, seed: int) -> np.ndarray:
        rng = stream_rng(RandomStream.IMAGE_CROP, seed, epoch, sample)
        data = self.data_config
        return train_transform(image, self.crop_hw, data.resize_range, data.max_enlargement, data.random_flip, rng)

    def _fetch(
        self, samples: Iterable[int], block: SampleBlock
    ) -> tuple[list[SampleLocation], list[bytes | Exception]]:
        on_retry = block.retries.append
        locations = locate_samples(self.manifest, samples, self.timeout_s, on_retry)
        return locations, fetch_located(self.url, locations, self.timeout_s, on_retry, self.cache)

    def _first_readable(
        self, location: SampleLocation, blob: bytes | Exception, skipped: list[str]
    ) -> tuple[Image.Image, SampleEntry]:
        """Decode a sample, or the next readable one of its shard."""
        shard, index = location
        max_short_side = round(max(self.crop_hw) * self.data_config.resize_range[1])
        for step in range(shard.num_samples):
            candidate = (index + step) % shard.num_samples
            if step:
                [blob] = fetch_located(self.url, [(shard, candidate)], cache=self.cache)
            entry = shard.entry(candidate)
            try:
                return decode_blob(blob, entry.size, max_short_side), entry
            except ValueError as error:
                skipped.append(f"{shard.name}: {entry.key}: {error}")
        raise RuntimeError(f"no sample of {storage.join(self.url, shard.name)} can be read; first: {skipped[0]}")

    def read_eval(self, samples: range) -> SampleBlock:
        """Read center crops of the resized images, uint8 (P, 3, size, size)."""
        return self.read_views(samples, 1, 0)[0]

    def read_views(self, samples: range, num_views: int, seed: int) -> list[SampleBlock]:
        """Read several crops of each image, which is decoded once; unreadable images are left out.

        Args:
            samples: numbers of the samples.
            num_views: number of crops: the center square, then random crops.
            seed: seed of the random crops.

        Returns:
            a block of each view, uint8 (P, 3, size, size).
        """
        size, reports = self.size, SampleBlock(np.empty(0, np.uint8), np.empty(0, np.int64), [])
        views: list[list[np.ndarray]] = [[] for _ in range(num_views)]
        labels, keys = [], []
        for sample, (shard, index), blob in zip(samples, *self._fetch(samples, reports), strict=True):
            entry = shard.entry(index)
            try:
                image = decode_blob(blob, entry.size, None)
            except ValueError as error:
                reports.skipped.append(f"{shard.name}: {entry.key}: {error}")
                continue
            views[0].append(eval_transform(image, size, self.data_config.eval_interpolation))
            # The number of a random crop takes the place of an epoch.
            for view in range(1, num_views):
                views[view].append(self._random_crop(image, sample, view, seed))
            labels.append(entry.label)
            keys.append(entry.key)
        return [
            SampleBlock(
                np.stack(crops) if crops else np.empty((0, 3, size, size), np.uint8),
                np.array(labels, np.int64),
                list(keys),
                list(reports.skipped),
                list(reports.retries),
            )
            for crops in views
        ]
