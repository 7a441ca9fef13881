"""Inception score (Salimans et al., NeurIPS 2016): classifier confidence per image and diversity of the set.

Shape suffixes: N images, V classes.
"""

from __future__ import annotations

import numpy as np


class InceptionScore:
    """Accumulates the inception score over parts of a set.

    The published score uses Inception logits and averages over ten splits of 5,000 images. This class uses one split.
    Scores of different classifiers are not comparable.
    """

    def __init__(self) -> None:
        self._num_images = 0
        self._negative_entropy_sum = 0.0
        self._probs_V: np.ndarray | float = 0.0

    def update(self, logits_NV: np.ndarray) -> None:
        """Add the logits (N, V) of images."""
        logits_NV = logits_NV.astype(np.float64)
        shifted_NV = logits_NV - logits_NV.max(1, keepdims=True)
        log_probs_NV = shifted_NV - np.log(np.exp(shifted_NV).sum(1, keepdims=True))
        probs_NV = np.exp(log_probs_NV)
        self._num_images += len(logits_NV)
        self._negative_entropy_sum += float((probs_NV * log_probs_NV).sum())
        self._probs_V = self._probs_V + probs_NV.sum(0)

    def compute(self) -> float:
        """Return exp(mean KL(p(y|x) ‖ p(y))), a value in [1, V]; higher is better.

        Raises:
            ValueError: there are fewer than two images.
        """
        if self._num_images < 2:
            raise ValueError("the inception score needs at least two images")
        # mean KL = entropy of the marginal - mean entropy. A class with probability 0 has weight 0; clip avoids log(0).
        marginal_V = np.asarray(self._probs_V) / self._num_images
        marginal_negative_entropy = (marginal_V * np.log(marginal_V.clip(np.finfo(np.float64).tiny))).sum()
        return float(np.exp(self._negative_entropy_sum / self._num_images - marginal_negative_entropy))
