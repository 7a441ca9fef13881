"""Packed photographs as a source: random crops for training, centre crops for evaluation."""

from __future__ import annotations

from typing import Any

import numpy as np

from bsq_ray import config
from bsq_ray.data.data_source import Samples, Source
from bsq_ray.data.manifest import Manifest
from bsq_ray.data.shard_reader import decode, fetch, read_samples
from bsq_ray.data.transforms import evaluation_image, training_crop


class PhotoSource(Source):
    """Images of `size` pixels cut from the photographs of a manifest.

    Args:
        patience: seconds for which storage may fail before what lies there counts as damaged.
    """

    def __init__(self, manifest: Manifest, section: config.Data, size: int, patience: float = 0.0) -> None:
        self.manifest, self.section, self.size, self.patience = manifest, section, size, patience
        self.url, self.hash = manifest.url, manifest.hash
        self.shard_sizes = tuple(len(shard.keys) for shard in manifest.shards)
        self.sample_bytes = 3 * size**2

    def read(self, samples_P: np.ndarray, epochs_P: np.ndarray, seed: int) -> Samples:
        """Random crops."""

        def crop(image: Any, p: int) -> np.ndarray:
            rng = np.random.default_rng((seed, int(epochs_P[p]), int(samples_P[p])))
            return training_crop(image, self.size, self.section.crop_scale, self.section.flip, rng)

        short_side = round(self.size * self.section.crop_scale[1])
        return read_samples(self.manifest, samples_P.tolist(), short_side, crop, self.patience)

    def read_held_out(self, samples: range) -> Samples:
        """Resized to the short side, then the centre."""
        size, resize_filter = self.size, self.section.evaluation_filter
        block = Samples(np.empty((0, 3, size, size), np.uint8), np.empty(0, np.int64), [])
        images, labels = [], []
        blobs = fetch(self.manifest, samples, self.patience, block.delays.append)
        for sample, blob in zip(samples, blobs, strict=True):
            shard, index = self.manifest.locate(sample)
            try:
                images.append(evaluation_image(decode(blob, shard.sizes[index], None), size, resize_filter))
            except ValueError as error:
                block.damaged.append(f"{shard.name}: {shard.keys[index]}: {error}")
                continue
            labels.append(shard.labels[index])
            block.keys.append(shard.keys[index])
        if images:
            block.values_P, block.labels_P = np.stack(images), np.array(labels, np.int64)
        return block
