"""Precision and recall of generated images (Kynkäänniemi et al., NeurIPS 2019), with k = 3 as the ADM evaluator uses.

Shape suffixes: N and M images, D features.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_ROWS = 1024


def precision_recall(real_ND: np.ndarray, drawn_MD: np.ndarray, neighbours: int = 3) -> dict[str, float]:
    """Share of drawn images inside the manifold of the real ones (precision), and the reverse (recall), 0 to 1.

    The manifold of a set is the union of balls around its images, each as wide as the distance to its k-th neighbour.

    Raises:
        ValueError: a set has too few images to have k neighbours.
    """
    if min(len(real_ND), len(drawn_MD)) <= neighbours:
        raise ValueError(f"precision and recall need more than {neighbours} images in each set")
    real, drawn = torch.from_numpy(real_ND).double(), torch.from_numpy(drawn_MD).double()
    return {
        "precision": _covered(drawn, real, _radii(real, neighbours)),
        "recall": _covered(real, drawn, _radii(drawn, neighbours)),
    }


def nearest_labels(features_ND: np.ndarray, known_MD: np.ndarray, labels_M: np.ndarray, neighbours: int) -> np.ndarray:
    """Class of each image (N,) by majority among its nearest known images, the nearer class where it is a tie."""
    points_ND, known = torch.from_numpy(features_ND).double(), torch.from_numpy(known_MD).double()
    voters = min(neighbours, len(known))
    near = [torch.cdist(part, known).topk(voters, largest=False).indices for part in points_ND.split(_ROWS)]
    return np.array([_majority(labels_M[row]) for row in torch.cat(near).numpy()])


def _majority(labels_k: np.ndarray) -> int:
    values, first, counts = np.unique(labels_k, return_index=True, return_counts=True)
    return int(values[np.lexsort((first, -counts))[0]])


def _radii(points_ND: Tensor, neighbours: int) -> Tensor:
    # The nearest of all is the point itself.
    rows = [torch.cdist(part, points_ND).kthvalue(neighbours + 1, dim=1).values for part in points_ND.split(_ROWS)]
    return torch.cat(rows)


def _covered(points_ND: Tensor, centres_MD: Tensor, radii_M: Tensor) -> float:
    inside = [(torch.cdist(part, centres_MD) <= radii_M).any(1) for part in points_ND.split(_ROWS)]
    return float(torch.cat(inside).double().mean())
