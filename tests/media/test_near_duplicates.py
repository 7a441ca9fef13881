"""Near-duplicates: copies of a photo are found in other sizes and qualities, and different photos are not."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from bsq_ray.media.near_duplicates import MIN_CORRELATION, near_duplicate_pairs, stack_vectors, thumbnail_vector


def jpeg(image, quality):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


COPIES = {
    "half the size": lambda image: image.resize((image.width // 2, image.height // 2)),
    "thumbnail": lambda image: image.resize((100, max(1, 100 * image.height // image.width))),
    "low quality": lambda image: jpeg(image, 20),
    "gray": lambda image: image.convert("L").convert("RGB"),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.1),
    "other filter": lambda image: image.resize((200, 150), Image.Resampling.NEAREST),
    "one pixel less": lambda image: image.crop((1, 0, image.width, image.height - 1)),
}


@pytest.mark.parametrize("copy", COPIES)
def test_near_duplicate_pairs_find_copies(photos, copy):
    """Every photo is paired with its own copy, and with no other photo."""
    vectors_ND, _ = stack_vectors(thumbnail_vector(photo) for photo in photos)
    copies_ND, _ = stack_vectors(thumbnail_vector(COPIES[copy](photo)) for photo in photos)
    assert [(n, m) for n, m, _ in near_duplicate_pairs(vectors_ND, copies_ND)] == [(n, n) for n in range(len(photos))]


@given(st.integers(0, 2**32), st.integers(1, 60), st.integers(1, 60), st.floats(0.5, 0.999))
def test_near_duplicate_pairs_equal_comparison_of_all(seed, count, num_others, min_correlation):
    """The tree finds exactly the pairs that a comparison of all vectors finds."""
    rng = np.random.default_rng(seed)
    others_MD = rng.normal(size=(num_others, 256)).astype(np.float32)
    # Some vectors are close to others.
    vectors_ND = others_MD[rng.integers(num_others, size=count)] + rng.uniform(0, 2) * rng.normal(size=(count, 256))
    vectors_ND, others_MD = (
        (each / np.linalg.norm(each, axis=1, keepdims=True)).astype(np.float32) for each in (vectors_ND, others_MD)
    )
    pairs = {(n, m) for n, m, _ in near_duplicate_pairs(vectors_ND, others_MD, min_correlation)}
    correlations = vectors_ND @ others_MD.T
    # Pairs at the limit may round to either side.
    certain, possible = (correlations > min_correlation + 1e-5), (correlations > min_correlation - 1e-5)
    assert {tuple(pair) for pair in np.argwhere(certain)} <= pairs <= {tuple(pair) for pair in np.argwhere(possible)}


def test_thumbnail_vector_of_flat_image_is_none():
    """Images without a pattern have no vector: all of them would be alike."""
    assert thumbnail_vector(Image.new("RGB", (100, 80), (200, 10, 30))) is None
    assert stack_vectors([None, None])[0].shape == (0, 256)
    assert near_duplicate_pairs(*(stack_vectors([None])[0] for _ in range(2))) == []


def test_thumbnail_vector_has_mean_0_and_norm_1(photos):
    vector_D = thumbnail_vector(photos[0])
    assert vector_D.shape == (256,)
    assert abs(vector_D.mean()) < 1e-6
    assert np.linalg.norm(vector_D) == pytest.approx(1, abs=1e-5)
    assert 0.9 < MIN_CORRELATION < 0.99
