"""Nearest neighbors in large reference sets: block by block in fp32, with bounded memory.

The order of |q - r|² is that of |r|² - 2 q·r, one matrix product for a block. Features are centered, so that fp32 loses
little of the differences.

Shape suffixes: N queries, M references of a block, D features, k neighbors.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# Number of queries in one product; 64 MB of distances to 16,384 references.
_QUERY_ROWS = 1024


class BlockSearch:
    """Finds the nearest references of a block for all queries.

    Args:
        queries_ND: features of the queries.
        num_neighbors: number of neighbors (k).
    """

    def __init__(self, queries_ND: np.ndarray, num_neighbors: int) -> None:
        self._center_D = queries_ND.mean(0, dtype=np.float64).astype(np.float32)
        self._queries_ND = queries_ND.astype(np.float32) - self._center_D
        self.num_neighbors = num_neighbors

    def __call__(self, block_MD: np.ndarray, device: torch.device | str = "cpu") -> tuple[np.ndarray, np.ndarray]:
        """Return fp32 distances up to a constant per query, ascending, and indices in the block, (N, min(k, M))."""
        references_MD = torch.from_numpy(block_MD.astype(np.float32) - self._center_D).to(device)
        norms_M = references_MD.square().sum(1)
        k = min(self.num_neighbors, len(block_MD))
        parts: list[tuple[Tensor, Tensor]] = []
        for first in range(0, len(self._queries_ND), _QUERY_ROWS):
            # A copy, because an array in Ray's object store is read-only.
            part_ND = torch.from_numpy(self._queries_ND[first : first + _QUERY_ROWS].copy()).to(device)
            distances_NM = torch.addmm(norms_M, part_ND, references_MD.T, alpha=-2)
            distances_Nk, indices_Nk = distances_NM.topk(k, largest=False)
            parts.append((distances_Nk.cpu(), indices_Nk.cpu()))
        return torch.cat([part[0] for part in parts]).numpy(), torch.cat([part[1] for part in parts]).numpy()


class NearestLabels:
    """Labels of the nearest references of each query, from blocks in any order.

    Args:
        num_queries: number of queries (N).
        num_neighbors: number of neighbors (k).
    """

    def __init__(self, num_queries: int, num_neighbors: int) -> None:
        self._num_neighbors = num_neighbors
        self._distances_Nk = np.zeros((num_queries, 0), np.float32)
        self._labels_Nk = np.zeros((num_queries, 0), np.int64)
        self._indices_Nk = np.zeros((num_queries, 0), np.int64)

    def add(self, distances_Nk: np.ndarray, indices_Nk: np.ndarray, labels_M: np.ndarray, first_index: int) -> None:
        """Add the result of `BlockSearch` for a block.

        Args:
            labels_M: labels of the block.
            first_index: index of the block's first reference; equal distances are ordered by index.
        """
        distances_Nk = np.concatenate([self._distances_Nk, distances_Nk], 1)
        labels_Nk = np.concatenate([self._labels_Nk, labels_M[indices_Nk]], 1)
        indices_Nk = np.concatenate([self._indices_Nk, first_index + indices_Nk], 1)
        order_Nk = np.lexsort((indices_Nk, distances_Nk))[:, : self._num_neighbors]
        self._distances_Nk, self._labels_Nk, self._indices_Nk = (
            np.take_along_axis(values_Nk, order_Nk, 1) for values_Nk in (distances_Nk, labels_Nk, indices_Nk)
        )

    def majority(self) -> np.ndarray:
        """Return the most frequent label (N,) of the nearest references; that of the nearest one breaks ties."""
        counts_Nk = (self._labels_Nk[:, :, None] == self._labels_Nk[:, None, :]).sum(2)
        # The first maximum is that of the nearest reference.
        nearest_N: np.ndarray = self._labels_Nk[np.arange(len(counts_Nk)), counts_Nk.argmax(1)]
        return nearest_N
