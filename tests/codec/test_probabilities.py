"""Rounding on which two machines agree, and the list of doubts."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from bsq_ray.codec import format_v1, probabilities
from bsq_ray.codec.side_info import (
    MAX_TOLERANCE_EXPONENT,
    RAW_METHOD,
    SideInfo,
    SideInfoError,
    choose_method,
    choose_shift,
    read_side_info,
    serialize_side_info,
    tolerance_of_method,
)
from bsq_ray.codec.varint import read_varint, write_varint

TOLERANCE = 2.0**-14
LOGITS = arrays(np.float64, st.integers(1, 60), elements=st.floats(-30, 30))


@pytest.mark.parametrize("shift", [0, 1, 2, 77, 255])
def test_probability_table_is_logistic_and_never_zero_or_one(shift):
    table, offset = probabilities.probability_table(shift), probabilities.shift_numerator(shift) / 256
    exact = [65536 / (1 + math.exp(-(n + offset) / 4)) for n in range(-40, 41)]
    assert np.abs(table - exact).max() <= 0.5
    assert table.min() >= 1
    assert table.max() <= 65535
    if shift == 0:
        assert (table + table[::-1] == 65536).all()


def test_shift_numerators_are_a_permutation_of_256_values():
    numerators = [probabilities.shift_numerator(shift) for shift in range(256)]
    assert numerators[:4] == [0, 128, 64, 192]
    assert sorted(numerators) == list(range(256))


@settings(max_examples=300)
@given(LOGITS, st.integers(0, 2**32 - 1), st.integers(0, 255))
def test_round_with_side_info_matches_encoder_within_tolerance(logits, seed, shift):
    """Also at the boundaries themselves, and whatever the difference up to the tolerance."""
    rng = np.random.default_rng(seed)
    offset = probabilities.shift_numerator(shift) / 256
    near = (np.floor(logits * 4 - offset) + offset + 0.5) / 4
    logits = np.where(rng.random(len(logits)) < 0.5, near + rng.uniform(-2, 2, len(logits)) * TOLERANCE, logits)
    levels, is_ambiguous = probabilities.round_logits(logits, TOLERANCE, shift)
    decoder_logits = logits + rng.choice([-1, 0, 1, 0.5], len(logits)) * TOLERANCE * (1 - 1e-9)
    decoded_levels, _ = probabilities.round_logits(decoder_logits, 0.0, shift)
    decoded_levels[is_ambiguous] = probabilities.round_with_side_info(
        decoder_logits[is_ambiguous], probabilities.is_rounded_up(logits, levels, shift)[is_ambiguous], shift
    )
    assert (decoded_levels == levels).all()


def test_round_logits_ambiguous_levels_are_rare():
    logits = np.random.default_rng(0).normal(0, 3, 200_000)
    _, is_ambiguous = probabilities.round_logits(logits, TOLERANCE)
    assert is_ambiguous.mean() == pytest.approx(2 * TOLERANCE / 0.25, rel=0.3)


@given(LOGITS, st.integers(0, 10))
def test_count_ambiguous_matches_rounding_for_every_shift(logits, method):
    counts = probabilities.count_ambiguous(logits, tolerance_of_method(method))
    for shift in (0, 1, 5, 128, 255):
        # Levels at the ends of the grid differ from shift to shift.
        inner = logits[np.abs(logits) < 9]
        ambiguous = probabilities.round_logits(inner, tolerance_of_method(method), shift)[1].sum()
        assert ambiguous == probabilities.count_ambiguous(inner, tolerance_of_method(method))[shift]
    assert counts.shape == (256,)


@pytest.mark.parametrize("num_logits", [1000, 5000])
def test_choose_shift_avoids_ambiguous_logits(num_logits):
    """Some shift has no ambiguous logit in a small group, at the cost of a few bits."""
    for seed in range(5):
        logits = np.random.default_rng(seed).normal(0, 3, num_logits)
        shift = choose_shift(logits, 0)
        assert not probabilities.round_logits(logits, TOLERANCE, shift)[1].any()


@pytest.mark.parametrize(
    ("error", "method"),
    [(0.0, 0), (2.0**-17, 0), (2.0**-16, 0), (2.0**-15.9, 1), (2.0**-10, 6), (2.0**-6, 10), (0.02, RAW_METHOD),
     (1e9, RAW_METHOD)],
)  # fmt: skip
def test_choose_method_keeps_margin_of_four(error, method):
    """The tolerance is the smallest power of two of at least four errors; beyond the largest, bits are stored raw."""
    assert choose_method(error, MAX_TOLERANCE_EXPONENT) == method
    assert choose_method(error, 8) == max(method, 6)


def read_bits(bits, num_nodes):
    stream = iter([*bits, *[0] * 64])
    return read_side_info(lambda: next(stream), num_nodes, len(bits)), sum(1 for _ in stream) - 64


@given(
    st.lists(st.tuples(st.integers(0, 50_000), st.booleans()), max_size=60, unique_by=lambda pair: pair[0]),
    st.integers(0, 10),
    st.integers(0, 255),
)
def test_side_info_write_and_read_roundtrip(pairs, method, shift):
    pairs = sorted(pairs)
    positions, round_up = np.array([p for p, _ in pairs], np.int64), np.array([u for _, u in pairs], bool)
    bits = serialize_side_info(SideInfo(method, shift, positions, round_up))
    side_info, num_left = read_bits(bits, 50_001)
    assert (side_info.method, side_info.shift, num_left) == (method, shift, 0)
    assert (side_info.positions == positions).all()
    assert (side_info.round_up == round_up).all()


@given(st.lists(st.integers(0, 1), max_size=300), st.integers(1, 1000))
def test_read_side_info_arbitrary_bits_parse_or_raise(bits, num_nodes):
    stream = iter([*bits, *[0] * 2000])
    try:
        side_info = read_side_info(lambda: next(stream), num_nodes, len(bits))
    except SideInfoError:
        return
    assert len(side_info.positions) == len(side_info.round_up)
    assert ((side_info.positions >= 0) & (side_info.positions < num_nodes)).all()


@given(st.binary(max_size=40), st.integers(1, 1000))
def test_read_side_info_v1_arbitrary_bytes_parse_or_raise(data, num_nodes):
    try:
        positions, round_up, length = format_v1.read_side_info(data, num_nodes)
    except ValueError:
        return
    assert len(positions) == len(round_up)
    assert length <= len(data)
    assert ((positions >= 0) & (positions < num_nodes)).all()


@given(st.integers(0, 2**62))
def test_varint_write_and_read_roundtrip(value):
    assert read_varint(write_varint(value) + b"x", 0) == (value, len(write_varint(value)))
    with pytest.raises(ValueError, match="truncated"):
        read_varint(write_varint(value)[:-1], 0)
