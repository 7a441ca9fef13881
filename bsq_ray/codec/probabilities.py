"""Integer probabilities that are equal in encoder and decoder although their logits differ in the last digits.

    logit ─▶ nearest level, a multiple of 1/4 ─▶ table of integers ─▶ probability of a 1

The logits of encoder and decoder differ by up to a tolerance ε. Where a logit lies within ε of the boundary between two
levels, the encoder stores its choice; everywhere else both round to the same level. The choices are stored as a sorted
list of positions, see `side_info.py`.
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


@cache
def probability_table() -> np.ndarray:
    """Return the probability of a 1 at each level as a multiple of 2^-16, uint32 (2 · MAX_LOGIT_LEVEL + 1,).

    round(2^16 / (1 + e^-x)) is computed in decimal arithmetic of 50 digits, so every machine gets the same integers.
    """
    with localcontext() as context:
        context.prec = 50
        one = Decimal(1)
        level_probabilities = [
            one / (one + (-Decimal(n) * Decimal(str(LOGIT_STEP))).exp())
            for n in range(-MAX_LOGIT_LEVEL, MAX_LOGIT_LEVEL + 1)
        ]
        return np.array([int((p * 2**PROB_BITS).to_integral_value()) for p in level_probabilities], np.uint32)


def probabilities_of_levels(levels: np.ndarray) -> np.ndarray:
    """Return the probability of a 1 for each level, float64; exact, because it is a multiple of 2^-16."""
    result: np.ndarray = probability_table()[levels + MAX_LOGIT_LEVEL] / 2.0**PROB_BITS
    return result


def round_logits(logits: np.ndarray, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    """Round the encoder's logits; return levels (int64) and whether each is within the tolerance of a boundary.

    Args:
        logits: float64.
        tolerance: maximum difference between the logits of encoder and decoder.
    """
    scaled = np.clip(logits / LOGIT_STEP, -MAX_LOGIT_LEVEL, MAX_LOGIT_LEVEL)
    # Distance to the boundary between floor and floor + 1; clipped logits have no boundary.
    to_boundary = np.abs(scaled - np.floor(scaled) - 0.5)
    inside = np.abs(scaled) < MAX_LOGIT_LEVEL
    return _nearest_level(scaled), (to_boundary <= tolerance / LOGIT_STEP) & inside


def round_with_side_info(logits: np.ndarray, round_up: np.ndarray) -> np.ndarray:
    """Round the decoder's logits at the ambiguous positions to the level above or below the nearest boundary.

    Args:
        logits: float64, at the ambiguous positions only.
        round_up: True where the encoder chose the level above.
    """
    boundary = np.floor(np.clip(logits / LOGIT_STEP, -MAX_LOGIT_LEVEL, MAX_LOGIT_LEVEL)).clip(
        -MAX_LOGIT_LEVEL, MAX_LOGIT_LEVEL - 1
    )
    levels: np.ndarray = boundary.astype(np.int64) + round_up.astype(np.int64)
    return levels


def rounded_up(logits: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Return whether the chosen level is above the boundary nearest to the logit."""
    boundary = np.floor(np.clip(logits / LOGIT_STEP, -MAX_LOGIT_LEVEL, MAX_LOGIT_LEVEL)).clip(
        -MAX_LOGIT_LEVEL, MAX_LOGIT_LEVEL - 1
    )
    round_up: np.ndarray = levels > boundary
    return round_up


def _nearest_level(scaled: np.ndarray) -> np.ndarray:
    nearest: np.ndarray = np.floor(scaled + 0.5).astype(np.int64).clip(-MAX_LOGIT_LEVEL, MAX_LOGIT_LEVEL)
    return nearest
