"""Inception features of images, real or drawn, and what is derived from them.

Shape suffixes: N images, B images of a batch, D features.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from bsq_ray import config, storage
from bsq_ray.data.images import to_float
from bsq_ray.data.manifest import Manifest
from bsq_ray.data.photos import PhotoSource
from bsq_ray.metrics.fid import FeatureStatistics, sampling_ranks
from bsq_ray.metrics.inception import Inception
from bsq_ray.metrics.weights import cache_folder, resolve_once
from bsq_ray.pool import map_in_pool

_BATCH = 32
# Images that take part in comparisons of pairs.
_PAIRED = 10_000


@dataclass(frozen=True)
class Features:
    """Inception features (N, 2048) of images, their classes (N,) and names."""

    features_ND: np.ndarray
    labels_N: np.ndarray
    keys: list[str]

    def statistics(self) -> FeatureStatistics:
        """Their sums, and a fair sample of at most 2,000."""
        statistics = FeatureStatistics(self.features_ND.shape[1])
        statistics.update(self.features_ND, self.keys)
        return statistics

    def paired(self) -> np.ndarray:
        """A fair sample for what compares all pairs."""
        return self.features_ND[np.argsort(sampling_ranks(self.keys), kind="stable")[:_PAIRED]]


def real_features(
    manifest: Manifest, run: config.TokenizerConfig, workers: int, address: str | None = None
) -> Features:
    """Features of all images of a data set, kept in the cache under the names of data, transform and weights."""
    size, resize_filter = run.model.image_size, run.data.evaluation_filter
    weights = resolve_once("fid-inception").sha256
    name = f"features-{manifest.hash[:16]}-{size}-{resize_filter}-{weights[:16]}.npz"
    path = cache_folder("features") / name
    if path.exists():
        with np.load(path) as kept:
            return Features(kept["features"], kept["labels"], [str(key) for key in kept["keys"]])
    chunks = [range(first, min(first + _BATCH, manifest.samples)) for first in range(0, manifest.samples, _BATCH)]
    source = PhotoSource(manifest, run.data, size)
    parts = list(map_in_pool(chunks, partial(_RealMeasured, source), workers, address))
    features = Features(
        np.concatenate([part.features_ND for part in parts]),
        np.concatenate([part.labels_N for part in parts]),
        [key for part in parts for key in part.keys],
    )
    buffer = io.BytesIO()
    np.savez(buffer, features=features.features_ND, labels=features.labels_N, keys=np.array(features.keys))
    storage.write_bytes(str(path), buffer.getvalue())
    return features


class _RealMeasured:
    def __init__(self, source: PhotoSource) -> None:
        self.source, self.inception = source, load_inception()

    def __call__(self, samples: range) -> Features:
        block = self.source.read_held_out(samples)
        images_BCHW = to_float(torch.from_numpy(block.values_P))
        return Features(inception_features(self.inception, images_BCHW), block.labels_P, block.keys)


def inception_features(inception: Inception, images_BCHW: Tensor) -> np.ndarray:
    """Features (B, 2048) of images in [-1, 1]."""
    features_BD: np.ndarray = inception(images_BCHW.to(device())).cpu().numpy()
    return features_BD


def load_inception() -> Inception:
    """The network, on the GPU if there is one."""
    return Inception().to(device())


def device() -> str:
    """Where a measuring process computes."""
    return "cuda" if torch.cuda.is_available() else "cpu"
