"""Rounding on which two machines agree, and the list of doubts."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from bsq_ray.codec import probabilities
from bsq_ray.codec.side_info import read_side, read_varint, write_side, write_varint

TOLERANCE = 2.0**-14
LOGITS = arrays(np.float64, st.integers(1, 60), elements=st.floats(-30, 30))


def test_the_table_is_the_logistic_function_and_never_certain():
    table = probabilities.table()
    exact = [65536 / (1 + math.exp(-n / 4)) for n in range(-40, 41)]
    assert np.abs(table - exact).max() <= 0.5
    assert table.min() >= 1
    assert table.max() <= 65535
    assert (table + table[::-1] == 65536).all()


@settings(max_examples=300)
@given(LOGITS, st.integers(0, 2**32 - 1))
def test_a_decoder_within_the_tolerance_rounds_as_the_encoder_did(logits, seed):
    """Also at the boundaries themselves, and whatever the difference up to the tolerance."""
    rng = np.random.default_rng(seed)
    near = (np.floor(logits * 4) + 0.5) / 4
    logits = np.where(rng.random(len(logits)) < 0.5, near + rng.uniform(-2, 2, len(logits)) * TOLERANCE, logits)
    steps, doubtful = probabilities.round_logits(logits, TOLERANCE)
    theirs = logits + rng.choice([-1, 0, 1, 0.5], len(logits)) * TOLERANCE * (1 - 1e-9)
    found, _ = probabilities.round_logits(theirs, 0.0)
    found[doubtful] = probabilities.settle(theirs[doubtful], probabilities.is_upper(logits, steps)[doubtful])
    assert (found == steps).all()


def test_doubts_are_rare():
    logits = np.random.default_rng(0).normal(0, 3, 200_000)
    _, doubtful = probabilities.round_logits(logits, TOLERANCE)
    assert doubtful.mean() == pytest.approx(2 * TOLERANCE / 0.25, rel=0.3)


@given(st.lists(st.tuples(st.integers(0, 50_000), st.booleans()), max_size=60, unique_by=lambda pair: pair[0]))
def test_side_information_comes_back(pairs):
    pairs = sorted(pairs)
    places, upper = np.array([p for p, _ in pairs], np.int64), np.array([u for _, u in pairs], bool)
    data = write_side(places, upper)
    found_places, found_upper, length = read_side(data + b"more", 50_001)
    assert (found_places == places).all()
    assert (found_upper == upper).all()
    assert length == len(data)


@given(st.binary(max_size=40), st.integers(1, 1000))
def test_any_bytes_are_read_or_refused(data, limit):
    try:
        places, upper, length = read_side(data, limit)
    except ValueError:
        return
    assert len(places) == len(upper)
    assert length <= len(data)
    assert ((places >= 0) & (places < limit)).all()


@given(st.integers(0, 2**62))
def test_varints_come_back(value):
    assert read_varint(write_varint(value) + b"x", 0) == (value, len(write_varint(value)))
    with pytest.raises(ValueError, match="cut off"):
        read_varint(write_varint(value)[:-1], 0)
