"""Integer probabilities on which encoder and decoder cannot disagree, though their logits differ in the last digits.

    logit ─▶ nearest step of a grid of 1/4 ─▶ a table of integers ─▶ probability of a 1

The encoder knows its logit only up to the tolerance ε by which the decoder's may differ. Where it lies within ε of a
boundary between two steps, it writes down which of the two it took; everywhere else both round alike. What is written
down is a list of places, sorted: see `side.py`.
"""

from __future__ import annotations

from decimal import Decimal, localcontext
from functools import cache

import numpy as np

# Steps are numbered -SPAN to SPAN; logits beyond are clipped, which bounds what a surprising bit costs.
LOGIT_STEP = 0.25
MAX_LOGIT_LEVEL = 40
# Probabilities are multiples of 2^-16.
PROB_BITS = 16


@cache
def probability_table() -> np.ndarray:
    """Probability of a 1 at each step, as integers out of 2^16, uint32 (2 · SPAN + 1,).

    round(2^16 / (1 + e^-x)) in decimal arithmetic of 50 digits, so that every machine computes the same integers.
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
    """Probability of a 1 for each step, float64: a multiple of 2^-16, so exact."""
    result: np.ndarray = probability_table()[levels + MAX_LOGIT_LEVEL] / 2.0**PROB_BITS
    return result


def round_logits(logits: np.ndarray, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    """The encoder's rounding: steps (int64), and whether each is too close to a boundary to be sure of.

    Args:
        logits: float64.
        tolerance: the largest difference between the encoder's and the decoder's logit.
    """
    scaled = np.clip(logits / LOGIT_STEP, -MAX_LOGIT_LEVEL, MAX_LOGIT_LEVEL)
    # To the boundary between floor and floor + 1; what is clipped has none beyond the ends.
    to_boundary = np.abs(scaled - np.floor(scaled) - 0.5)
    inside = np.abs(scaled) < MAX_LOGIT_LEVEL
    return _nearest_level(scaled), (to_boundary <= tolerance / LOGIT_STEP) & inside


def round_with_side_info(logits: np.ndarray, round_up: np.ndarray) -> np.ndarray:
    """The decoder's rounding where the encoder wrote down its choice: the step above or below the nearest boundary.

    Args:
        logits: float64, of the places in the list only.
        upper: whether the encoder took the step above.
    """
    boundary = np.floor(np.clip(logits / LOGIT_STEP, -MAX_LOGIT_LEVEL, MAX_LOGIT_LEVEL)).clip(
        -MAX_LOGIT_LEVEL, MAX_LOGIT_LEVEL - 1
    )
    levels: np.ndarray = boundary.astype(np.int64) + round_up.astype(np.int64)
    return levels


def rounded_up(logits: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Whether the step taken is the one above the boundary that the logit is near to."""
    boundary = np.floor(np.clip(logits / LOGIT_STEP, -MAX_LOGIT_LEVEL, MAX_LOGIT_LEVEL)).clip(
        -MAX_LOGIT_LEVEL, MAX_LOGIT_LEVEL - 1
    )
    round_up: np.ndarray = levels > boundary
    return round_up


def _nearest_level(scaled: np.ndarray) -> np.ndarray:
    nearest: np.ndarray = np.floor(scaled + 0.5).astype(np.int64).clip(-MAX_LOGIT_LEVEL, MAX_LOGIT_LEVEL)
    return nearest
