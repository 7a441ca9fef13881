"""Features of real and generated images: Inception for FID and KID, a classifier for their classes.

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
from bsq_ray.metrics.classifier import EfficientNetLite0
from bsq_ray.metrics.fid import FeatureStatistics, sampling_ranks
from bsq_ray.metrics.inception import Inception
from bsq_ray.models.pretrained_weights import cache_folder, resolve_once
from bsq_ray.runtime.actor_pool import actor_map_ordered
from bsq_ray.runtime.device import default_device
from bsq_ray.runtime.precision import enable_strict_fp32

_BATCH = 32
# Number of images in metrics that compare all pairs.
_MAX_PAIRWISE = 10_000
# Names of the weights of the two networks.
NETWORKS = ("fid-inception", "imagenet-classifier")


@dataclass(frozen=True)
class Features:
    """Features of N images.

    Attributes:
        inception_ND: Inception's features (N, 2048).
        classifier_NC: the classifier's features (N, 1280).
        labels_N: class of each image.
        keys: name of each image.
    """

    inception_ND: np.ndarray
    classifier_NC: np.ndarray
    labels_N: np.ndarray
    keys: list[str]

    def statistics(self) -> FeatureStatistics:
        """Return the sums of the Inception features and a random subset of at most 2,000."""
        statistics = FeatureStatistics(self.inception_ND.shape[1])
        statistics.update(self.inception_ND, self.keys)
        return statistics

    def pairwise_subset(self) -> np.ndarray:
        """Return the Inception features of a random subset of at most 10,000 images."""
        return self.inception_ND[np.argsort(sampling_ranks(self.keys), kind="stable")[:_MAX_PAIRWISE]]


def real_features(
    manifest: Manifest, run: config.TokenizerConfig, workers: int, address: str | None = None
) -> Features:
    """Return the features of all images of a data set, from the cache if it contains them.

    The name of the cache file contains the hashes of the data and the weights and the resize.

    Raises:
        ValueError: the data set does not contain images.
        RuntimeError: an image cannot be read.
    """
    size, resize_filter = run.model.image_size, run.data.eval_interpolation
    weights = "-".join(resolve_once(network).sha256[:12] for network in NETWORKS)
    name = f"features-{manifest.hash[:16]}-{size}-{resize_filter}-{weights}.npz"
    path = cache_folder("features") / name
    if path.exists():
        with np.load(path) as cached:
            return Features(cached["features"], cached["seen"], cached["labels"], [str(key) for key in cached["keys"]])
    chunks = [
        range(first, min(first + _BATCH, manifest.num_samples)) for first in range(0, manifest.num_samples, _BATCH)
    ]
    source = build_pixel_source(run, manifest)
    parts = list(actor_map_ordered(chunks, partial(_RealFeatureExtractor, source), workers, address))
    features = Features(
        np.concatenate([part.inception_ND for part in parts]),
        np.concatenate([part.classifier_NC for part in parts]),
        np.concatenate([part.labels_N for part in parts]),
        [key for part in parts for key in part.keys],
    )
    buffer = io.BytesIO()
    keys = np.array(features.keys)
    np.savez(buffer, features=features.inception_ND, seen=features.classifier_NC, labels=features.labels_N, keys=keys)
    storage.write_bytes(str(path), buffer.getvalue())
    return features


class _RealFeatureExtractor:
    """Read a range of real images and return their features."""

    def __init__(self, source: DataSource) -> None:
        self.source, self.extractors = source, FeatureExtractors()

    def __call__(self, samples: range) -> Features:
        block = self.source.read_eval(samples)
        if block.skipped:
            # The cache contains complete data sets only.
            raise RuntimeError(f"{self.source.url} has an image that cannot be read: {block.skipped[0]}")
        return Features(*self.extractors(to_float(torch.from_numpy(block.values_P))), block.labels_P, block.keys)


class FeatureExtractors:
    """Run both networks, on the GPU if there is one."""

    def __init__(self) -> None:
        enable_strict_fp32()
        self.inception, self.classifier = Inception().to(default_device()), EfficientNetLite0().to(default_device())

    def __call__(self, images_BCHW: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Return features (B, 2048) and (B, 1280) of images in [-1, 1], (B, 3, H, W)."""
        images_BCHW = images_BCHW.to(default_device())
        return self.inception(images_BCHW).cpu().numpy(), self.classifier(images_BCHW).cpu().numpy()
