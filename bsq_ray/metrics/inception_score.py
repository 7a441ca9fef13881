"""Inception score (Salimans et al., NeurIPS 2016): confidence of a classifier in each image, and variety of the set.

Shape suffixes: N images, V classes.
"""

from __future__ import annotations

import numpy as np


def inception_score(logits_NV: np.ndarray) -> float:
    """Return exp of the mean KL divergence of each image's classes from those of all images, 1 to V; higher is better.

    The published score uses Inception's logits and the mean over ten parts of 5,000 images. This one uses all images at
    once. Scores of different classifiers are not comparable.

    Raises:
        ValueError: there are fewer than two images.
    """
    if len(logits_NV) < 2:
        raise ValueError("the inception score needs at least two images")
    logits_NV = logits_NV.astype(np.float64)
    shifted_NV = logits_NV - logits_NV.max(1, keepdims=True)
    logs_NV = shifted_NV - np.log(np.exp(shifted_NV).sum(1, keepdims=True))
    probabilities_NV = np.exp(logs_NV)
    # A class of probability 0 has weight 0; the clip avoids log(0).
    overall_V = np.log(probabilities_NV.mean(0).clip(np.finfo(np.float64).tiny))
    return float(np.exp((probabilities_NV * (logs_NV - overall_V)).sum(1).mean()))
