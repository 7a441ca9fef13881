"""Side information of a group of tiles: rounding of the logits, and the rounding direction of ambiguous logits.

    method · grid shift · number of positions · for each position: gap to the previous one, and the rounding direction

The prior codes each bit of a token at a node of a binary tree (see `bitstream.py`). A position is the index of a node
in coding order. The range coder codes all bits of the side information with probability 1/2 before those of the nodes,
so that nothing is byte-aligned.
Integers are Exp-Golomb codes of order 0: n + 1 in binary, preceded by one fewer zeros than it has digits. Gaps are Rice
codes whose parameter follows from the method.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import log2

import numpy as np

from bsq_ray.codec import probabilities

# Method m < RAW_METHOD tolerates a difference of 2^(m - 14) between the logits of encoder and decoder. With RAW_METHOD
# the prior is not used: every bit has probability 1/2.
MIN_TOLERANCE_EXPONENT, MAX_TOLERANCE_EXPONENT = 4, 14
RAW_METHOD = MAX_TOLERANCE_EXPONENT - MIN_TOLERANCE_EXPONENT + 1


@dataclass(frozen=True)
class SideInfo:
    """Side information of a group.

    Attributes:
        method: tolerance of the logits, or `RAW_METHOD`.
        shift: index of the grid shift, see `probabilities`.
        positions: int64, ascending; indices of the ambiguous nodes in coding order.
        round_up: bool; rounding direction at each position.
    """

    method: int
    shift: int
    positions: np.ndarray
    round_up: np.ndarray


class SideInfoError(ValueError):
    """The bits are not valid side information."""


def choose_method(max_logit_error: float, max_exponent: int) -> int:
    """Return the method with the smallest tolerance of at least four times the fp32 error of the logits.

    Args:
        max_logit_error: bound of the difference between a logit in fp32 and its true value.
        max_exponent: lower bound of the tolerance, as 2^-max_exponent.

    Returns:
        `RAW_METHOD` if the error is too large for every tolerance.
    """
    exponent = max_exponent if max_logit_error == 0 else min(max_exponent, int(np.floor(-log2(4 * max_logit_error))))
    return MAX_TOLERANCE_EXPONENT - exponent if exponent >= MIN_TOLERANCE_EXPONENT else RAW_METHOD


def tolerance_of_method(method: int) -> float:
    """Return the largest allowed difference between the logits of encoder and decoder."""
    return 2.0 ** (method - MAX_TOLERANCE_EXPONENT)


def choose_shift(logits: np.ndarray, method: int) -> int:
    """Return the index of the grid shift with the smallest side information.

    Args:
        logits: float64, of all nodes.
        method: other than `RAW_METHOD`.
    """
    counts = probabilities.count_ambiguous(logits, tolerance_of_method(method))
    bits_per_position = _rice_parameter(method) + 2.5
    costs = [_exp_golomb_length(k) + _exp_golomb_length(int(n)) + n * bits_per_position for k, n in enumerate(counts)]
    return int(np.argmin(costs))


def serialize_side_info(side_info: SideInfo) -> list[int]:
    """Return the side information as a list of bits, each 0 or 1."""
    bits = _exp_golomb_bits(side_info.method)
    if side_info.method == RAW_METHOD:
        return bits
    bits += _exp_golomb_bits(side_info.shift) + _exp_golomb_bits(len(side_info.positions))
    rice_parameter = _rice_parameter(side_info.method)
    gaps = np.diff(side_info.positions, prepend=-1) - 1
    for gap, direction in zip(gaps.tolist(), side_info.round_up.tolist(), strict=True):
        bits += [1] * (gap >> rice_parameter) + [0]
        bits += [gap >> n & 1 for n in range(rice_parameter - 1, -1, -1)]
        bits.append(int(direction))
    return bits


def read_side_info(next_bit: Callable[[], int], num_nodes: int, max_bits: int) -> SideInfo:
    """Parse side information.

    Args:
        next_bit: returns the next bit of the range coder at probability 1/2.
        num_nodes: exclusive upper bound of the positions.
        max_bits: number of bits that the payload can contain.

    Raises:
        SideInfoError: a value is out of range.
    """
    method = _read_exp_golomb(next_bit, RAW_METHOD)
    if method == RAW_METHOD:
        return SideInfo(method, 0, np.empty(0, np.int64), np.empty(0, bool))
    shift = _read_exp_golomb(next_bit, probabilities.NUM_SHIFTS - 1)
    num_positions, rice_parameter = _read_exp_golomb(next_bit, num_nodes), _rice_parameter(method)
    # At probability 1/2 each bit takes one bit of the payload, so a wrong count is detected before positions are read.
    if num_positions * (rice_parameter + 2) > max_bits:
        raise SideInfoError("the side information is damaged: it has too many positions")
    positions, round_up, position = np.empty(num_positions, np.int64), np.empty(num_positions, bool), -1
    for n in range(num_positions):
        gap = 0
        while next_bit():
            gap += 1
            if position + (gap << rice_parameter) >= num_nodes:
                raise SideInfoError("the side information is damaged: it contains a position out of range")
        for _ in range(rice_parameter):
            gap = gap << 1 | next_bit()
        position += gap + 1
        if position >= num_nodes:
            raise SideInfoError("the side information is damaged: it contains a position out of range")
        positions[n], round_up[n] = position, bool(next_bit())
    return SideInfo(method, shift, positions, round_up)


def _rice_parameter(method: int) -> int:
    # On average one node in 2^(e - 3) is ambiguous, for a tolerance of 2^-e.
    return max(0, MAX_TOLERANCE_EXPONENT - method - 4)


def _exp_golomb_bits(value: int) -> list[int]:
    digits = [int(digit) for digit in f"{value + 1:b}"]
    return [0] * (len(digits) - 1) + digits


def _exp_golomb_length(value: int) -> int:
    return 2 * (value + 1).bit_length() - 1


def _read_exp_golomb(next_bit: Callable[[], int], maximum: int) -> int:
    num_zeros = 0
    while not next_bit():
        num_zeros += 1
        if num_zeros > maximum.bit_length():
            raise SideInfoError("the side information is damaged: a number is too large")
    value = 1
    for _ in range(num_zeros):
        value = value << 1 | next_bit()
    if value - 1 > maximum:
        raise SideInfoError("the side information is damaged: a number is too large")
    return value - 1
