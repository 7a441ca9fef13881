"""Precision and recall of generated images (Kynkäänniemi et al., NeurIPS 2019), with k = 3 as the ADM evaluator uses.

Shape suffixes: N and M images, D features.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_CHUNK_ROWS = 1024


def precision_recall(real_ND: np.ndarray, generated_MD: np.ndarray, num_neighbors: int = 3) -> dict[str, float]:
    """Return the fraction of generated images in the manifold of the real ones (precision), and the reverse (recall).

    The manifold of a set is the union of balls around its images, with the distance to the k-th neighbor as radius.

    Raises:
        ValueError: a set has too few images for k neighbors.
    """
    if min(len(real_ND), len(generated_MD)) <= num_neighbors:
        raise ValueError(f"precision and recall need more than {num_neighbors} images in each set")
    real, generated = torch.from_numpy(real_ND).double(), torch.from_numpy(generated_MD).double()
    return {
        "precision": _fraction_covered(generated, real, _radii(real, num_neighbors)),
        "recall": _fraction_covered(real, generated, _radii(generated, num_neighbors)),
    }


def _radii(points_ND: Tensor, num_neighbors: int) -> Tensor:
    # The nearest point of the set is the point itself.
    rows = [
        torch.cdist(part, points_ND).kthvalue(num_neighbors + 1, dim=1).values for part in points_ND.split(_CHUNK_ROWS)
    ]
    return torch.cat(rows)


def _fraction_covered(points_ND: Tensor, centers_MD: Tensor, radii_M: Tensor) -> float:
    inside = [(torch.cdist(part, centers_MD) <= radii_M).any(1) for part in points_ND.split(_CHUNK_ROWS)]
    return float(torch.cat(inside).double().mean())
