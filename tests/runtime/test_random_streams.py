"""Random streams: no two purposes, seeds or counters give the same numbers."""

from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bsq_ray.runtime.random_streams import RandomStream, stream_rng, stream_seed

words = st.lists(st.integers(0, 2**80) | st.text(max_size=4), max_size=5)


@given(st.sampled_from(RandomStream), words, st.sampled_from(RandomStream), words)
def test_stream_seed_depends_on_purpose_and_every_word(stream, values, other_stream, other_values):
    """Equal seeds mean equal purposes and words; zeros at the end count."""
    same = (stream, values) == (other_stream, other_values)
    assert (stream_seed(stream, *values) == stream_seed(other_stream, *other_values)) == same
    assert stream_seed(stream, *values, 0) != stream_seed(stream, *values)


def test_stream_seed_of_small_words_never_repeats():
    """All purposes with all small seeds and counters have different seeds."""
    counters = [counter for length in range(1, 5) for counter in product(range(4), repeat=length)]
    seeds = [stream_seed(stream, *counter) for stream in RandomStream for counter in counters]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_stream_rng_of_crop_and_order_differ():
    """The order of shards, the order in a block and the crop of a sample are independent at equal counters."""
    draws = [stream_rng(stream, 0, 0, 0, 0).random(8) for stream in RandomStream]
    assert not any(np.allclose(first, second) for first, second in combinations(draws, 2))


@pytest.mark.parametrize("stream", [RandomStream.SHARD_ORDER, RandomStream.IMAGE_CROP])
def test_stream_rng_repeats(stream):
    assert stream_rng(stream, 3, "key").random() == stream_rng(stream, 3, "key").random()
