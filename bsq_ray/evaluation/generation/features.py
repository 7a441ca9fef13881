"""Features of real and generated images: Inception for FID and KID, a classifier for their classes.

The features of real images are files in the cache, which are mapped into memory: 1.28 million images take 17 GB of disk
and no memory of their own.

Shape suffixes: N images, B images of a batch, D Inception features, C features of the classifier.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bsq_ray import config
from bsq_ray.data.data_source import DataSource
from bsq_ray.data.factory import build_pixel_source
from bsq_ray.data.manifest import Manifest
from bsq_ray.data.transforms import to_float
from bsq_ray.metrics.classifier import NUM_FEATURES as NUM_CLASSIFIER_FEATURES
from bsq_ray.metrics.classifier import EfficientNetLite0
from bsq_ray.metrics.fid import FeatureStatistics, sampling_ranks
from bsq_ray.metrics.inception import NUM_FEATURES as NUM_INCEPTION_FEATURES
from bsq_ray.metrics.inception import Inception
from bsq_ray.metrics.inception_score import InceptionScore
from bsq_ray.metrics.nearest import BlockSearch, NearestLabels
from bsq_ray.models.pretrained_weights import cache_folder, resolve_once
from bsq_ray.runtime.actor_pool import actor_map_ordered
from bsq_ray.runtime.device import default_device
from bsq_ray.runtime.precision import enable_strict_fp32
from bsq_ray.runtime.task_map import task_map

_BATCH = 32
# Largest number of images per item of the pool of actors; small sets have several items per actor.
_MAX_CHUNK = 256
# Number of images whose features are in memory of one process: 67 MB.
_BLOCK = 8192
# Number of images in metrics that compare all pairs.
_MAX_PAIRWISE = 10_000
# Names of the weights of the two networks.
NETWORKS = ("fid-inception", "imagenet-classifier")


@dataclass(frozen=True)
class Workers:
    """Number of Ray actors or tasks, and the cluster; 0 computes in this process, without Ray."""

    count: int = 0
    address: str | None = None


@dataclass(frozen=True)
class Features:
    """Features of N images, in memory or in files.

    Attributes:
        inception_ND: Inception's features (N, 2048).
        classifier_NC: the classifier's features (N, 1280).
        labels_N: class of each image.
        ranks_N: `sampling_ranks` of the images' keys, which order random subsets.
    """

    inception_ND: np.ndarray
    classifier_NC: np.ndarray
    labels_N: np.ndarray
    ranks_N: np.ndarray

    @classmethod
    def allocate(cls, num_images: int, folder: Path | None = None) -> Features:
        """Return features without values, in files of a folder or in memory."""

        def empty(name: str, shape: tuple[int, ...], dtype: type) -> np.ndarray:
            if folder is None:
                return np.empty(shape, dtype)
            return np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, shape)

        return cls(
            empty("inception", (num_images, NUM_INCEPTION_FEATURES), np.float32),
            empty("classifier", (num_images, NUM_CLASSIFIER_FEATURES), np.float32),
            empty("labels", (num_images,), np.int64),
            empty("ranks", (num_images,), np.uint64),
        )

    @classmethod
    def open(cls, folder: Path) -> Features:
        """Map the files of a folder into memory."""
        names = ("inception", "classifier", "labels", "ranks")
        return cls(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in names))

    def fill(self, first: int, part: Features) -> None:
        """Copy the features of a part to the positions from `first` on."""
        rows = slice(first, first + len(part.labels_N))
        self.inception_ND[rows], self.classifier_NC[rows] = part.inception_ND, part.classifier_NC
        self.labels_N[rows], self.ranks_N[rows] = part.labels_N, part.ranks_N

    def pairwise_subset(self) -> np.ndarray:
        """Return the Inception features of a random subset of at most 10,000 images."""
        return self.inception_ND[np.argsort(self.ranks_N, kind="stable")[:_MAX_PAIRWISE]]

    def statistics(self, workers: Workers) -> FeatureStatistics:
        """Return the sums of the Inception features and a random subset of at most 2,000, summed block by block."""
        statistics = FeatureStatistics(self.inception_ND.shape[1])
        blocks = ((self.inception_ND[rows], self.ranks_N[rows]) for rows in _block_slices(len(self.labels_N)))
        # A single block is summed before a task could start.
        num_tasks = workers.count if len(self.labels_N) > _BLOCK else 0
        for part in task_map(_sum_block, blocks, num_tasks, workers.address):
            statistics.merge(part)
        return statistics

    def inception_score(self, classifier: EfficientNetLite0) -> float:
        """Return the inception score by the classifier's logits."""
        score = InceptionScore()
        for rows in _block_slices(len(self.labels_N)):
            score.update(classifier.logits(torch.from_numpy(np.array(self.classifier_NC[rows]))).numpy())
        return score.compute()


def nearest_classes(images: Features, reference: Features, num_neighbors: int, workers: Workers) -> np.ndarray:
    """Return the majority class (N,) of the nearest reference images; the class of the nearest image breaks ties.

    Tasks compare all images with blocks of the reference, on GPUs where there are any. Memory does not grow with the
    reference.
    """
    search = BlockSearch(images.classifier_NC, num_neighbors)
    nearest = NearestLabels(len(images.labels_N), num_neighbors)
    slices = list(_block_slices(len(reference.labels_N)))
    blocks = ((number, np.array(reference.classifier_NC[rows])) for number, rows in enumerate(slices))
    num_tasks = min(workers.count, len(slices)) if len(slices) > 1 else 0
    for number, distances_Nk, indices_Nk in task_map(
        partial(_search_block, search), blocks, num_tasks, workers.address, use_gpus=True
    ):
        rows = slices[number]
        nearest.add(distances_Nk, indices_Nk, np.asarray(reference.labels_N[rows]), rows.start)
    return nearest.majority()


def _block_slices(num_images: int) -> Iterator[slice]:
    return (slice(first, min(first + _BLOCK, num_images)) for first in range(0, num_images, _BLOCK))


def _sum_block(inception_ND: np.ndarray, ranks_N: np.ndarray) -> FeatureStatistics:
    statistics = FeatureStatistics(inception_ND.shape[1])
    statistics.update_ranked(inception_ND, ranks_N)
    return statistics


def _search_block(search: BlockSearch, number: int, block_MC: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
    enable_strict_fp32()
    return number, *search(block_MC, default_device())


def real_features(manifest: Manifest, run: config.TokenizerConfig, workers: Workers) -> Features:
    """Return the features of all images of a data set, from the cache if it contains them.

    The name of the folder in the cache contains the hashes of the data and the weights and the resize.

    Raises:
        ValueError: the data set does not contain images.
        RuntimeError: an image cannot be read.
    """
    size, resize_filter = run.model.image_size, run.data.eval_interpolation
    weights = "-".join(resolve_once(network).sha256[:12] for network in NETWORKS)
    folder = cache_folder("features") / f"features-{manifest.hash[:16]}-{size}-{resize_filter}-{weights}"
    if folder.exists():
        return Features.open(folder)
    source = build_pixel_source(run, manifest)
    chunk_size = min(_MAX_CHUNK, max(_BATCH, manifest.num_samples // (4 * max(1, workers.count))))
    firsts = range(0, manifest.num_samples, chunk_size)
    chunks = [range(first, min(first + chunk_size, manifest.num_samples)) for first in firsts]
    # Another process may fill the same folder of the cache.
    partial_folder = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.partial")
    partial_folder.mkdir(parents=True)
    try:
        features = Features.allocate(manifest.num_samples, partial_folder)
        parts = actor_map_ordered(chunks, partial(_RealFeatureExtractor, source), workers.count, workers.address)
        for chunk, part in zip(chunks, parts, strict=True):
            features.fill(chunk.start, part)
        del features
        try:
            partial_folder.rename(folder)
        except OSError:
            # Another process has published the same features meanwhile.
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)
    return Features.open(folder)


class _RealFeatureExtractor:
    """Read a range of real images and return their features."""

    def __init__(self, source: DataSource) -> None:
        self.source, self.extractors = source, FeatureExtractors()

    def __call__(self, samples: range) -> Features:
        block = self.source.read_eval(samples)
        if block.skipped:
            # The cache contains complete data sets only.
            raise RuntimeError(f"{self.source.url} has an image that cannot be read: {block.skipped[0]}")
        batches = torch.from_numpy(block.values_P).split(_BATCH)
        parts = [self.extractors(to_float(batch_BCHW)) for batch_BCHW in batches]
        inception_ND, classifier_NC = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return Features(inception_ND, classifier_NC, block.labels_P, sampling_ranks(block.keys))


class FeatureExtractors:
    """Run both networks, on the GPU if there is one."""

    def __init__(self) -> None:
        enable_strict_fp32()
        self.inception, self.classifier = Inception().to(default_device()), EfficientNetLite0().to(default_device())

    def __call__(self, images_BCHW: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Return features (B, 2048) and (B, 1280) of images in [-1, 1], (B, 3, H, W)."""
        images_BCHW = images_BCHW.to(default_device())
        return self.inception(images_BCHW).cpu().numpy(), self.classifier(images_BCHW).cpu().numpy()
