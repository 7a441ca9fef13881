"""Rounding on which two machines agree, and the list of doubts."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from bsq_ray.codec import probabilities
from bsq_ray.codec.side_info import read_side_info, read_varint, write_side_info, write_varint

TOLERANCE = 2.0**-14
LOGITS = arrays(np.float64, st.integers(1, 60), elements=st.floats(-30, 30))


def test_probability_table_is_logistic_and_never_zero_or_one():
    table = probabilities.probability_table()
    exact = [65536 / (1 + math.exp(-n / 4)) for n in range(-40, 41)]
    assert np.abs(table - exact).max() <= 0.5
    assert table.min() >= 1
    assert table.max() <= 65535
    assert (table + table[::-1] == 65536).all()


@settings(max_examples=300)
@given(LOGITS, st.integers(0, 2**32 - 1))
def test_round_with_side_info_matches_encoder_within_tolerance(logits, seed):
    """Also at the boundaries themselves, and whatever the difference up to the tolerance."""
    rng = np.random.default_rng(seed)
    near = (np.floor(logits * 4) + 0.5) / 4
    logits = np.where(rng.random(len(logits)) < 0.5, near + rng.uniform(-2, 2, len(logits)) * TOLERANCE, logits)
    levels, is_ambiguous = probabilities.round_logits(logits, TOLERANCE)
    decoder_logits = logits + rng.choice([-1, 0, 1, 0.5], len(logits)) * TOLERANCE * (1 - 1e-9)
    decoded_levels, _ = probabilities.round_logits(decoder_logits, 0.0)
    decoded_levels[is_ambiguous] = probabilities.round_with_side_info(
        decoder_logits[is_ambiguous], probabilities.rounded_up(logits, levels)[is_ambiguous]
    )
    assert (decoded_levels == levels).all()


def test_round_logits_ambiguous_levels_are_rare():
    logits = np.random.default_rng(0).normal(0, 3, 200_000)
    _, is_ambiguous = probabilities.round_logits(logits, TOLERANCE)
    assert is_ambiguous.mean() == pytest.approx(2 * TOLERANCE / 0.25, rel=0.3)


@given(st.lists(st.tuples(st.integers(0, 50_000), st.booleans()), max_size=60, unique_by=lambda pair: pair[0]))
def test_side_info_write_and_read_roundtrip(pairs):
    pairs = sorted(pairs)
    positions, round_up = np.array([p for p, _ in pairs], np.int64), np.array([u for _, u in pairs], bool)
    data = write_side_info(positions, round_up)
    read_positions, read_round_up, length = read_side_info(data + b"more", 50_001)
    assert (read_positions == positions).all()
    assert (read_round_up == round_up).all()
    assert length == len(data)


@given(st.binary(max_size=40), st.integers(1, 1000))
def test_read_side_info_arbitrary_bytes_parse_or_raise(data, limit):
    try:
        positions, round_up, length = read_side_info(data, limit)
    except ValueError:
        return
    assert len(positions) == len(round_up)
    assert length <= len(data)
    assert ((positions >= 0) & (positions < limit)).all()


@given(st.integers(0, 2**62))
def test_varint_write_and_read_roundtrip(value):
    assert read_varint(write_varint(value) + b"x", 0) == (value, len(write_varint(value)))
    with pytest.raises(ValueError, match="truncated"):
        read_varint(write_varint(value)[:-1], 0)
