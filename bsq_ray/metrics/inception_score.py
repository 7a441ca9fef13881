"""Inception score (Salimans et al., NeurIPS 2016): classifier confidence per image and diversity of the set.

Shape suffixes: N images, V classes.
"""

from __future__ import annotations

import numpy as np


def inception_score(logits_NV: np.ndarray) -> float:
    """Return exp(mean KL(p(y|x) ‖ p(y))), a value in [1, V]; higher is better.

    The published score uses Inception logits and averages over ten splits of 5,000 images. This function uses one
    split. Scores of different classifiers are not comparable.

    Raises:
        ValueError: there are fewer than two images.
    """
    if len(logits_NV) < 2:
        raise ValueError("the inception score needs at least two images")
    logits_NV = logits_NV.astype(np.float64)
    shifted_NV = logits_NV - logits_NV.max(1, keepdims=True)
    log_probs_NV = shifted_NV - np.log(np.exp(shifted_NV).sum(1, keepdims=True))
    probs_NV = np.exp(log_probs_NV)
    # A class with probability 0 has weight 0; clip avoids log(0).
    log_marginal_V = np.log(probs_NV.mean(0).clip(np.finfo(np.float64).tiny))
    return float(np.exp((probs_NV * (log_probs_NV - log_marginal_V)).sum(1).mean()))
