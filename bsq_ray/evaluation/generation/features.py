"""What two public networks see in images, real or drawn: Inception for FID and KID, a classifier for their classes.

Shape suffixes: N images, B images of a batch, D Inception features, C features of the classifier.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from bsq_ray import config, storage
from bsq_ray.data.data_source import DataSource
from bsq_ray.data.factory import build_pixel_source
from bsq_ray.data.manifest import Manifest
from bsq_ray.data.transforms import to_float
from bsq_ray.metrics.classifier import Classifier
from bsq_ray.metrics.fid import FeatureStatistics, sampling_ranks
from bsq_ray.metrics.inception import Inception
from bsq_ray.metrics.pretrained_weights import cache_folder, resolve_once
from bsq_ray.runtime.actor_pool import actor_map_ordered
from bsq_ray.runtime.precision import strict_fp32

_BATCH = 32
# Images that take part in comparisons of pairs.
_PAIRED = 10_000
# The networks, by the names of their weights.
NETWORKS = ("fid-inception", "imagenet-classifier")


@dataclass(frozen=True)
class Features:
    """Inception's (N, 2048) and the classifier's (N, 1280) features of images, their classes (N,) and names."""

    features_ND: np.ndarray
    seen_NC: np.ndarray
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
    """Features of all images of a data set, kept in the cache under the names of data, transform and weights.

    Raises:
        ValueError: the data are no images.
        RuntimeError: an image cannot be read.
    """
    size, resize_filter = run.model.image_size, run.data.evaluation_filter
    weights = "-".join(resolve_once(network).sha256[:12] for network in NETWORKS)
    name = f"features-{manifest.hash[:16]}-{size}-{resize_filter}-{weights}.npz"
    path = cache_folder("features") / name
    if path.exists():
        with np.load(path) as kept:
            return Features(kept["features"], kept["seen"], kept["labels"], [str(key) for key in kept["keys"]])
    chunks = [
        range(first, min(first + _BATCH, manifest.num_samples)) for first in range(0, manifest.num_samples, _BATCH)
    ]
    source = build_pixel_source(run, manifest)
    parts = list(actor_map_ordered(chunks, partial(_RealMeasured, source), workers, address))
    features = Features(
        np.concatenate([part.features_ND for part in parts]),
        np.concatenate([part.seen_NC for part in parts]),
        np.concatenate([part.labels_N for part in parts]),
        [key for part in parts for key in part.keys],
    )
    buffer = io.BytesIO()
    keys = np.array(features.keys)
    np.savez(buffer, features=features.features_ND, seen=features.seen_NC, labels=features.labels_N, keys=keys)
    storage.write_bytes(str(path), buffer.getvalue())
    return features


class _RealMeasured:
    def __init__(self, source: DataSource) -> None:
        self.source, self.networks = source, Networks()

    def __call__(self, samples: range) -> Features:
        block = self.source.read_eval(samples)
        if block.skipped:
            # What is kept in the cache is said to be the whole data set.
            raise RuntimeError(f"{self.source.url} has an image that cannot be read: {block.skipped[0]}")
        return Features(*self.networks(to_float(torch.from_numpy(block.values_P))), block.labels_P, block.keys)


class Networks:
    """Both networks, on the GPU if there is one."""

    def __init__(self) -> None:
        strict_fp32()
        self.inception, self.classifier = Inception().to(device()), Classifier().to(device())

    def __call__(self, images_BCHW: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Features (B, 2048) and (B, 1280) of images in [-1, 1]."""
        images_BCHW = images_BCHW.to(device())
        return self.inception(images_BCHW).cpu().numpy(), self.classifier(images_BCHW).cpu().numpy()


def device() -> str:
    """Where a measuring process computes."""
    return "cuda" if torch.cuda.is_available() else "cpu"
