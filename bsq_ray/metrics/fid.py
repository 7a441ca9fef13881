"""Fréchet and kernel Inception distance between two sets of images, from features that arrive in batches.

FID (Heusel et al., 2017) needs mean and covariance, which are sums over features. KID (Bińkowski et al., 2018) compares
pairs: the features of at most 2,000 images are kept, those whose keys have the smallest hashes. This is a random subset
that does not depend on the number of workers.

Shape suffixes: N and M images, D features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Number of images whose features are kept for KID: 2,000 x 2,048 floats are 16 MB.
KID_SUBSET_SIZE = 2000
# Number of images per product of feature matrices; products of single batches take several times as long per image.
_SUM_BLOCK = 512
# Number of images whose features are converted to fp64 at a time: 64 MB.
_MAX_DOUBLES = 4096


def sampling_ranks(keys: Sequence[str]) -> np.ndarray:
    """Return a hash of each key, uint64 (N,); the keys with the smallest hashes are a random subset."""
    return np.array(
        [
            int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest())
            for key in keys
        ],
        np.uint64,
    )


class FeatureStatistics:
    """Sums of features for FID and the features of a bounded random subset for KID.

    Features wait until there are enough of them for an efficient matrix product. Statistics of parts of a set, computed
    anywhere, can be merged; those of few images are small when they are pickled.

    Args:
        width: number of features (D).
    """

    def __init__(self, width: int = 2048) -> None:
        self.num_samples = 0
        self.width = width
        # The sums of the features that were added; None before the first ones.
        self._sums: tuple[np.ndarray, np.ndarray] | None = None
        self._kid_subset_ND = np.zeros((0, width), np.float32)
        self._ranks_N = np.zeros(0, np.uint64)
        # Features (N, D) and ranks (N,) that are not part of the sums yet.
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []
        self._num_waiting = 0

    def update(self, features_ND: np.ndarray, keys: Sequence[str]) -> None:
        """Add the features (N, D) of a batch and the keys of its images."""
        self.update_ranked(features_ND, sampling_ranks(keys))

    def update_ranked(self, features_ND: np.ndarray, ranks_N: np.ndarray) -> None:
        """Add the features (N, D) of a batch and the `sampling_ranks` of its images."""
        self.num_samples += len(features_ND)
        self._num_waiting += len(features_ND)
        self._waiting.append((features_ND, ranks_N))
        if self._num_waiting >= _SUM_BLOCK:
            self._add_waiting()

    def merge(self, other: FeatureStatistics) -> None:
        """Add the statistics of another part of the set."""
        self.num_samples += other.num_samples
        if other._sums is not None:
            sum_D, products_DD = self._sums or (0.0, 0.0)
            self._sums = sum_D + other._sums[0], products_DD + other._sums[1]
            self._update_kid_subset(other._kid_subset_ND, other._ranks_N)
        self._waiting += other._waiting
        self._num_waiting += other._num_waiting
        if self._num_waiting >= _SUM_BLOCK:
            self._add_waiting()

    def _add_waiting(self) -> None:
        if not self._num_waiting:
            return
        features_ND = np.concatenate([features for features, _ in self._waiting])
        ranks_N = np.concatenate([ranks for _, ranks in self._waiting])
        self._waiting, self._num_waiting = [], 0
        self._update_kid_subset(features_ND, ranks_N)
        for first in range(0, len(features_ND), _MAX_DOUBLES):
            part_ND = features_ND[first : first + _MAX_DOUBLES].astype(np.float64)
            sum_D, products_DD = self._sums or (0.0, 0.0)
            self._sums = sum_D + part_ND.sum(0), products_DD + part_ND.T @ part_ND

    def _update_kid_subset(self, features_ND: np.ndarray, ranks_N: np.ndarray) -> None:
        if len(self._ranks_N) == KID_SUBSET_SIZE:
            # Most features of a large set have no chance.
            is_candidate_N = ranks_N < self._ranks_N[-1]
            features_ND, ranks_N = features_ND[is_candidate_N], ranks_N[is_candidate_N]
        ranks_N = np.concatenate([self._ranks_N, ranks_N])
        first_N = np.argsort(ranks_N, kind="stable")[:KID_SUBSET_SIZE]
        self._ranks_N = ranks_N[first_N]
        self._kid_subset_ND = np.concatenate([self._kid_subset_ND, features_ND])[first_N]

    def _sums_of_all(self) -> tuple[np.ndarray, np.ndarray]:
        self._add_waiting()
        return self._sums or (np.zeros(self.width), np.zeros((self.width, self.width)))

    def kid_subset(self) -> np.ndarray:
        """Return the kept features (N, D), N at most 2,000, in an order that depends on the keys only."""
        self._add_waiting()
        return self._kid_subset_ND.astype(np.float64)

    def mean(self) -> np.ndarray:
        """Return the mean (D,)."""
        return self._sums_of_all()[0] / self.num_samples

    def covariance(self) -> np.ndarray:
        """Return the unbiased covariance (D, D)."""
        mean_D = self.mean()
        centered_DD = self._sums_of_all()[1] - self.num_samples * np.outer(mean_D, mean_D)
        return centered_DD / (self.num_samples - 1)


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """Return |μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2 (Σ₁Σ₂)^½).

    The trace of the root is computed from eigenvalues, which is stable for singular covariances of few images.

    Raises:
        ValueError: a set has fewer than two images.
    """
    if min(first.num_samples, second.num_samples) < 2:
        raise ValueError("the Fréchet distance needs at least two images or clips in each set")
    difference_D = first.mean() - second.mean()
    first_DD, second_DD = first.covariance(), second.covariance()
    # Σ₁Σ₂ has the eigenvalues of Σ₁^½ Σ₂ Σ₁^½, which is symmetric and positive.
    values_D, vectors_DD = np.linalg.eigh(first_DD)
    root_DD = (vectors_DD * np.sqrt(values_D.clip(0))) @ vectors_DD.T
    trace_root = np.sqrt(np.linalg.eigvalsh(root_DD @ second_DD @ root_DD).clip(0)).sum()
    return float(difference_D @ difference_D + np.trace(first_DD) + np.trace(second_DD) - 2 * trace_root)


def _kernel(first_ND: np.ndarray, second_MD: np.ndarray) -> np.ndarray:
    """Polynomial kernel (x·y / D + 1)³ of all pairs, (N, M)."""
    values_NM: np.ndarray = (first_ND @ second_MD.T / first_ND.shape[1] + 1) ** 3
    return values_NM


def kernel_distance(first_ND: np.ndarray, second_MD: np.ndarray) -> float:
    """Return the KID of two independent sets: the unbiased squared maximum mean discrepancy, possibly below 0.

    Raises:
        ValueError: a set has fewer than two images.
    """
    n, m = len(first_ND), len(second_MD)
    if min(n, m) < 2:
        raise ValueError("KID needs at least two images in each set")
    own_first_NN, own_second_MM = _kernel(first_ND, first_ND), _kernel(second_MD, second_MD)
    within = (own_first_NN.sum() - np.trace(own_first_NN)) / (n * (n - 1))
    within += (own_second_MM.sum() - np.trace(own_second_MM)) / (m * (m - 1))
    return float(within - 2 * _kernel(first_ND, second_MD).mean())


@dataclass(frozen=True)
class PairedKernelDistance:
    """KID of images and their reconstructions.

    Attributes:
        value: the distance; 0 for perfect reconstructions.
        standard_error: by the jackknife over images; None for fewer than three images.
        num_samples: number of images it was computed from.
    """

    value: float
    standard_error: float | None
    num_samples: int


def paired_kernel_distance(original_ND: np.ndarray, reconstruction_ND: np.ndarray) -> PairedKernelDistance:
    """Return the KID of N images and their N reconstructions, in the same order.

    The two sets are not independent. The estimator is the U-statistic (Gretton et al., 2012, section 3) of

        h(i, j) = k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(x_j, y_i),   i ≠ j,

    which never compares an image with its own reconstruction. `kernel_distance` would, and would be biased downwards.

    Raises:
        ValueError: there are fewer than two images.
    """
    n = len(original_ND)
    if n < 2:
        raise ValueError("KID needs at least two images in each set")
    cross_NN = _kernel(original_ND, reconstruction_ND)
    pairs_NN = _kernel(original_ND, original_ND) + _kernel(reconstruction_ND, reconstruction_ND) - cross_NN - cross_NN.T
    np.fill_diagonal(pairs_NN, 0)
    total = pairs_NN.sum()
    value = float(total / (n * (n - 1)))
    if n < 3:
        return PairedKernelDistance(value, None, n)
    without_one_N = (total - 2 * pairs_NN.sum(0)) / ((n - 1) * (n - 2))
    variance = (n - 1) / n * ((without_one_N - without_one_N.mean()) ** 2).sum()
    return PairedKernelDistance(value, float(np.sqrt(variance)), n)
