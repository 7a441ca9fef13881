"""Integer probabilities that are equal in encoder and decoder although their logits differ by rounding errors.

    logit ─▶ nearest level of a grid with step 1/4 ─▶ table of integers ─▶ probability of a 1

The logits of encoder and decoder differ by up to a tolerance ε. Where a logit lies within ε of the boundary between two
levels, the encoder stores the rounding direction; everywhere else both round to the same level. The encoder shifts the
grid so that few logits are near a boundary. `side_info.py` stores the directions and their positions.
"""

from __future__ import annotations

from decimal import Decimal, localcontext
from functools import cache

import numpy as np

# Levels are -MAX_LOGIT_LEVEL to MAX_LOGIT_LEVEL. Clipping larger logits bounds the cost of an unlikely bit.
LOGIT_STEP = 0.25
MAX_LOGIT_LEVEL = 40
# Probabilities are multiples of 2^-16.
PROB_BITS = 16
# The grid can be shifted by multiples of 1/256 of a step.
_SHIFT_BITS = 8
NUM_SHIFTS = 2**_SHIFT_BITS


def shift_numerator(shift: int) -> int:
    """Return the grid shift of an index, in 1/256 of a step: the bit reversal of its eight bits.

    Small indices, which are cheap to store, are therefore spread over the step: 0, 128, 64, 192, 32 …
    """
    return int(f"{shift:0{_SHIFT_BITS}b}"[::-1], 2)


@cache
def probability_table(shift: int = 0) -> np.ndarray:
    """Return the probability of a 1 at each level as a multiple of 2^-16, uint32 (2 · MAX_LOGIT_LEVEL + 1,).

    round(2^16 / (1 + e^-x)) is computed in decimal arithmetic of 50 digits, so every machine gets the same integers.

    Args:
        shift: index of the grid shift.
    """
    with localcontext() as context:
        context.prec = 50
        one, offset = Decimal(1), Decimal(shift_numerator(shift)) / NUM_SHIFTS
        level_probabilities = [
            one / (one + (-(Decimal(n) + offset) * Decimal(str(LOGIT_STEP))).exp())
            for n in range(-MAX_LOGIT_LEVEL, MAX_LOGIT_LEVEL + 1)
        ]
        return np.array([int((p * 2**PROB_BITS).to_integral_value()) for p in level_probabilities], np.uint32)


def probabilities_of_levels(levels: np.ndarray, shift: int = 0) -> np.ndarray:
    """Return the probability of a 1 for each level, float64; exact, because it is a multiple of 2^-16."""
    result: np.ndarray = probability_table(shift)[levels + MAX_LOGIT_LEVEL] / 2.0**PROB_BITS
    return result


def round_logits(logits: np.ndarray, tolerance: float, shift: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Round the encoder's logits.

    Args:
        logits: float64.
        tolerance: maximum difference between the logits of encoder and decoder.
        shift: index of the grid shift.

    Returns:
        Levels (int64), and True for logits within the tolerance of a boundary between two levels.
    """
    scaled = _scale(logits, shift)
    # Distance to the boundary between floor and floor + 1; clipped logits have no boundary.
    boundary_distance = np.abs(scaled - np.floor(scaled) - 0.5)
    is_unclipped = np.abs(scaled) < MAX_LOGIT_LEVEL
    nearest: np.ndarray = np.floor(scaled + 0.5).astype(np.int64).clip(-MAX_LOGIT_LEVEL, MAX_LOGIT_LEVEL)
    return nearest, (boundary_distance <= tolerance / LOGIT_STEP) & is_unclipped


def count_ambiguous(logits: np.ndarray, tolerance: float) -> np.ndarray:
    """Return the number of logits within the tolerance of a boundary for each grid shift, int64 (NUM_SHIFTS,)."""
    scaled = logits.ravel() / LOGIT_STEP
    # Boundaries of shift k lie at multiples of 1/256 of a step.
    position = (scaled - 0.5) % 1.0 * NUM_SHIFTS
    radius = tolerance / LOGIT_STEP * NUM_SHIFTS
    position = position[np.abs(scaled) < MAX_LOGIT_LEVEL]
    counts = np.zeros(NUM_SHIFTS, np.int64)
    for distance in range(-int(radius) - 1, int(radius) + 2):
        nearest = np.rint(position) + distance
        is_near = np.abs(position - nearest) <= radius
        counts += np.bincount(nearest[is_near].astype(np.int64) % NUM_SHIFTS, minlength=NUM_SHIFTS)
    return counts[[shift_numerator(shift) for shift in range(NUM_SHIFTS)]]


def round_with_side_info(logits: np.ndarray, round_up: np.ndarray, shift: int = 0) -> np.ndarray:
    """Round the decoder's logits at the ambiguous positions to the level above or below the nearest boundary.

    Args:
        logits: float64, at the ambiguous positions only.
        round_up: True where the encoder chose the level above.
        shift: index of the grid shift.
    """
    levels: np.ndarray = _level_below(logits, shift) + round_up.astype(np.int64)
    return levels


def is_rounded_up(logits: np.ndarray, levels: np.ndarray, shift: int = 0) -> np.ndarray:
    """Return True where the chosen level is above the boundary nearest to the logit."""
    round_up: np.ndarray = levels > _level_below(logits, shift)
    return round_up


def _level_below(logits: np.ndarray, shift: int) -> np.ndarray:
    below: np.ndarray = np.floor(_scale(logits, shift)).clip(-MAX_LOGIT_LEVEL, MAX_LOGIT_LEVEL - 1).astype(np.int64)
    return below


def _scale(logits: np.ndarray, shift: int) -> np.ndarray:
    """Convert logits to units of the grid step, clipped to the range of levels."""
    scaled: np.ndarray = logits / LOGIT_STEP - shift_numerator(shift) / NUM_SHIFTS
    return np.clip(scaled, -MAX_LOGIT_LEVEL, MAX_LOGIT_LEVEL)
