"""Bits, bytes and integers: exact for every length."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bsq_ray.models.quantizers.bits import bits_to_integers, integers_to_bits, pack_bits, unpack_bits

lengths = st.integers(1, 128)
seeds = st.integers(0, 2**31)


def random_bits(length, seed, tokens=7):
    return torch.rand(2, tokens, length, generator=torch.Generator().manual_seed(seed)) < 0.5


@given(lengths, seeds)
def test_pack_bits_roundtrip(length, seed):
    bits = random_bits(length, seed)
    packed = pack_bits(bits)
    assert packed.dtype == torch.uint8
    assert packed.shape[-1] == -(-length // 8)
    assert torch.equal(unpack_bits(packed, length), bits)


@given(lengths, seeds, st.integers(1, 62))
def test_bits_to_integers_roundtrip_for_every_width(length, seed, sub_bits):
    bits = random_bits(length * sub_bits, seed, tokens=2)
    integers = bits_to_integers(bits, sub_bits)
    assert torch.equal(integers_to_bits(integers, sub_bits), bits)
    assert integers.min() >= 0
    assert integers.max() < 2**sub_bits


def test_bits_to_integers_first_bit_is_least_significant():
    bits = torch.tensor([[[True, False, False, True]]])
    assert bits_to_integers(bits, 4).item() == 9
    assert bits_to_integers(bits, 2).tolist() == [[[1, 2]]]
    assert pack_bits(bits).item() == 9


def test_bits_to_integers_36_bits_are_exact():
    bits = random_bits(36, 3, tokens=1000)
    expected = [sum(int(b) << i for i, b in enumerate(token)) for token in bits[0].tolist()]
    assert bits_to_integers(bits, 36)[0, :, 0].tolist() == expected


def test_bits_invalid_widths_raise():
    bits = random_bits(18, 0)
    with pytest.raises(ValueError, match="18 bits cannot be cut into sub-tokens of 5"):
        bits_to_integers(bits, 5)
    with pytest.raises(ValueError, match="1 to 62"):
        bits_to_integers(bits, 63)
    with pytest.raises(ValueError, match="2 bytes do not hold tokens of 18 bits; 3 do"):
        unpack_bits(torch.zeros(4, 2, dtype=torch.uint8), 18)
