"""Nearest references block by block: equal to all fp64 distances at once."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from bsq_ray.metrics.nearest import BlockSearch, NearestLabels


def nearest_labels(queries_ND, references_MD, labels_M, k, block_sizes):
    """Return the majority labels from blocks of these sizes."""
    search, nearest = BlockSearch(queries_ND, k), NearestLabels(len(queries_ND), k)
    edges = np.cumsum([0, *block_sizes])
    blocks = [(first, references_MD[first:end]) for first, end in pairwise(edges)]
    for first, block_MD in reversed(blocks):
        nearest.add(*search(block_MD), labels_M[first : first + len(block_MD)], first)
    return nearest.majority()


def majority(labels_k):
    counts = [int((labels_k == label).sum()) for label in labels_k]
    return labels_k[int(np.argmax(counts))]


@pytest.mark.parametrize("block_sizes", [[3000], [1000, 1500, 500], [3, 2997], [100] * 30])
def test_nearest_labels_equal_all_fp64_distances(block_sizes):
    """The features have a common offset, as features after a ReLU do, which is where fp32 could lose digits."""
    rng = np.random.default_rng(0)
    references_MD = (5 + rng.normal(size=(3000, 128))).astype(np.float32)
    queries_ND, labels_M = (5 + rng.normal(size=(1500, 128))).astype(np.float32), rng.integers(0, 10, 3000)
    distances = torch.cdist(torch.from_numpy(queries_ND).double(), torch.from_numpy(references_MD).double())
    expected = [majority(labels_M[row]) for row in distances.topk(5, largest=False).indices.numpy()]
    assert nearest_labels(queries_ND, references_MD, labels_M, 5, block_sizes).tolist() == expected


def test_nearest_labels_majority_wins_and_nearest_breaks_ties():
    references, labels = np.array([[0.0], [1.0], [2.0], [10.0], [11.0]]), np.array([0, 0, 1, 1, 2])
    assert nearest_labels(np.array([[0.2], [10.6]]), references, labels, 3, [5]).tolist() == [0, 1]
    assert nearest_labels(np.array([[10.9]]), references, labels, 2, [2, 3]).tolist() == [2]


def test_nearest_labels_fewer_references_than_neighbors():
    assert nearest_labels(np.array([[0.0]]), np.array([[1.0], [2.0]]), np.array([7, 8]), 5, [1, 1]).tolist() == [7]


def test_nearest_labels_equal_distances_use_the_first_index():
    """The result does not depend on the order in which blocks arrive."""
    references, labels = np.ones((4, 2)), np.array([3, 2, 1, 0])
    assert nearest_labels(np.zeros((1, 2)), references, labels, 1, [1, 1, 1, 1]).tolist() == [3]
