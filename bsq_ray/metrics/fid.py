"""Fréchet and kernel Inception distance between two sets of images, from features that stream through.

FID (Heusel et al., 2017) needs mean and covariance: sums over features. KID (Bińkowski et al., 2018) needs pairs: it
keeps the features of at most 2,000 images, those whose keys come first by their hash. That is a fair sample, and the
same one however the images were divided among workers.

Shape suffixes: N images, D features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

# Features kept for KID: 2,000 x 2,048 doubles are 32 MB.
_KID_SUBSET_SIZE = 2000


def sampling_ranks(keys: Sequence[str]) -> np.ndarray:
    """Places of the keys in a random order that every process agrees on, uint64 (N,): the smallest are a sample."""
    return np.array([int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest()) for key in keys], np.uint64)


class FeatureStatistics:
    """Sums of features for FID and a bounded part of the features for KID."""

    def __init__(self, width: int = 2048) -> None:
        self.num_samples = 0
        self._sum_D = np.zeros(width)
        self._products_DD = np.zeros((width, width))
        self._kid_subset_ND = np.zeros((0, width))
        self._ranks_N = np.zeros(0, np.uint64)

    def update(self, features_ND: np.ndarray, keys: Sequence[str]) -> None:
        """Adds the features of a batch and the keys of its images."""
        features_ND = features_ND.astype(np.float64)
        self._sum_D += features_ND.sum(0)
        self._products_DD += features_ND.T @ features_ND
        self._update_kid_subset(features_ND, sampling_ranks(keys))
        self.num_samples += len(features_ND)

    def _update_kid_subset(self, features_ND: np.ndarray, ranks_N: np.ndarray) -> None:
        ranks_N = np.concatenate([self._ranks_N, ranks_N])
        first_N = np.argsort(ranks_N, kind="stable")[:_KID_SUBSET_SIZE]
        self._ranks_N = ranks_N[first_N]
        self._kid_subset_ND = np.concatenate([self._kid_subset_ND, features_ND])[first_N]

    def kid_subset(self) -> np.ndarray:
        """The kept features (N, D), N at most 2,000, in an order that depends on the keys only."""
        return self._kid_subset_ND

    def mean(self) -> np.ndarray:
        """Mean (D,)."""
        return self._sum_D / self.num_samples

    def covariance(self) -> np.ndarray:
        """Unbiased covariance (D, D)."""
        mean_D = self.mean()
        centered_DD = self._products_DD - self.num_samples * np.outer(mean_D, mean_D)
        return centered_DD / (self.num_samples - 1)


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """|μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2 (Σ₁Σ₂)^½), with the root's trace from eigenvalues, so few images are no problem.

    Raises:
        ValueError: a set has fewer than two images.
    """
    if min(first.num_samples, second.num_samples) < 2:
        raise ValueError("a Fréchet distance needs at least two images or clips in each set")
    difference_D = first.mean() - second.mean()
    first_DD, second_DD = first.covariance(), second.covariance()
    # Σ₁Σ₂ has the eigenvalues of Σ₁^½ Σ₂ Σ₁^½, which is symmetric and positive.
    values_D, vectors_DD = np.linalg.eigh(first_DD)
    root_DD = (vectors_DD * np.sqrt(values_D.clip(0))) @ vectors_DD.T
    trace_root = np.sqrt(np.linalg.eigvalsh(root_DD @ second_DD @ root_DD).clip(0)).sum()
    return float(difference_D @ difference_D + np.trace(first_DD) + np.trace(second_DD) - 2 * trace_root)


def kernel_distance(first_ND: np.ndarray, second_ND: np.ndarray) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel (x·y / D + 1)³; can be slightly negative.

    Raises:
        ValueError: a set has fewer than two images.
    """
    n, m, width = len(first_ND), len(second_ND), first_ND.shape[1]
    if min(n, m) < 2:
        raise ValueError("KID needs at least two images in each set")

    def kernel(a_ND: np.ndarray, b_ND: np.ndarray) -> np.ndarray:
        values: np.ndarray = (a_ND @ b_ND.T / width + 1) ** 3
        return values

    own_first, own_second = kernel(first_ND, first_ND), kernel(second_ND, second_ND)
    within = (own_first.sum() - np.trace(own_first)) / (n * (n - 1))
    within += (own_second.sum() - np.trace(own_second)) / (m * (m - 1))
    return float(within - 2 * kernel(first_ND, second_ND).mean())
