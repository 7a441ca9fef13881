"""Compare the images of two packed data sets, and name those that both contain."""

from __future__ import annotations

import numpy as np

from bsq_ray.data.inspect import iter_images
from bsq_ray.data.manifest import Manifest
from bsq_ray.media.near_duplicates import THUMBNAIL_SIDE, near_duplicate_pairs, stack_vectors, thumbnail_vector


def find_near_duplicates(manifest: Manifest, other: Manifest) -> list[str]:
    """Return "key: like KEY of URL (correlation)" for each image or video that the other data set contains, too.

    Both sets are read once; 1 KB per image is kept in memory. Videos are compared by their middle frames.

    Args:
        manifest: the data set to report on.
        other: the data set to search, such as the training set of a held-out set. With `manifest` itself, copies within
            the set are reported, each by the image that comes first.
    """
    vectors_ND, samples_N = _vectors(manifest)
    is_same = manifest.url == other.url
    others_MD, others_M = (vectors_ND, samples_N) if is_same else _vectors(other)
    best: dict[int, tuple[float, int]] = {}
    for n, m, correlation in near_duplicate_pairs(vectors_ND, others_MD):
        sample, other_sample = int(samples_N[n]), int(others_M[m])
        if not (is_same and other_sample >= sample):
            best[sample] = max(best.get(sample, (0.0, 0)), (correlation, other_sample))
    return [
        f"{_key(manifest, sample)}: like {_key(other, other_sample)} of {other.url} ({correlation:.3f})"
        for sample, (correlation, other_sample) in sorted(best.items())
    ]


def _vectors(manifest: Manifest) -> tuple[np.ndarray, np.ndarray]:
    """Return the vectors of the images that can be decoded and are not flat (N, D), and their numbers (N,)."""
    images = iter_images(manifest, range(manifest.num_samples), 2 * THUMBNAIL_SIDE)
    return stack_vectors(None if isinstance(image, str) else thumbnail_vector(image) for image in images)


def _key(manifest: Manifest, sample: int) -> str:
    shard, index = manifest.locate(sample)
    return shard.key(index)
