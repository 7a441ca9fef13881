"""Packed photographs as a source: random crops for training, centre crops for evaluation."""

from __future__ import annotations

from typing import Any

import numpy as np

from bsq_ray import config
from bsq_ray.data.data_source import DataSource, SampleBlock
from bsq_ray.data.manifest import Manifest
from bsq_ray.data.shard_reader import decode_blob, fetch_encoded, read_samples
from bsq_ray.data.transforms import eval_transform, train_transform


class ImageSource(DataSource):
    """Images of `size` pixels cut from the photographs of a manifest.

    Args:
        patience: seconds for which storage may fail before what lies there counts as damaged.
    """

    def __init__(self, manifest: Manifest, data_config: config.DataConfig, size: int, timeout_s: float = 0.0) -> None:
        self.manifest, self.data_config, self.size, self.timeout_s = manifest, data_config, size, timeout_s
        self.url, self.hash = manifest.url, manifest.hash
        self.shard_sizes = tuple(len(shard.keys) for shard in manifest.shards)
        self.sample_bytes = 3 * size**2

    def read(self, samples_P: np.ndarray, epochs_P: np.ndarray, seed: int) -> SampleBlock:
        """Random crops."""

        def crop(image: Any, p: int) -> np.ndarray:
            rng = np.random.default_rng((seed, int(epochs_P[p]), int(samples_P[p])))
            return train_transform(image, self.size, self.data_config.resize_range, self.data_config.random_flip, rng)

        short_side = round(self.size * self.data_config.resize_range[1])
        return read_samples(self.manifest, samples_P.tolist(), short_side, crop, self.timeout_s)

    def read_eval(self, samples: range) -> SampleBlock:
        """Resized to the short side, then the centre."""
        size, interpolation = self.size, self.data_config.eval_interpolation
        block = SampleBlock(np.empty((0, 3, size, size), np.uint8), np.empty(0, np.int64), [])
        images, labels = [], []
        blobs = fetch_encoded(self.manifest, samples, self.timeout_s, block.retries.append)
        for sample, blob in zip(samples, blobs, strict=True):
            shard, index = self.manifest.locate(sample)
            try:
                images.append(eval_transform(decode_blob(blob, shard.sizes[index], None), size, interpolation))
            except ValueError as error:
                block.skipped.append(f"{shard.name}: {shard.keys[index]}: {error}")
                continue
            labels.append(shard.labels[index])
            block.keys.append(shard.keys[index])
        if images:
            block.values_P, block.labels_P = np.stack(images), np.array(labels, np.int64)
        return block
